"""Experts read from the Hub by range: the same merge, nothing of them on disk, every byte checked."""

from __future__ import annotations

import json
from pathlib import Path

import family as families
import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file

import mats_hub
from mats_hub import hub_client, source, streaming
from mats_hub.cli import main
from mats_hub.errors import MatsError, SourceError

WEIGHTS = "model.safetensors"
EXPERTS = [f"alice/{name}" for name in families.LABELS]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return families.make_family(tmp_path_factory.mktemp("family"), card=families.EXPERT_CARD)


@pytest.fixture
def token(hub, local, monkeypatch):
    """Put the family on the Hub; waiting takes no time, and a file is many chunks."""
    monkeypatch.setattr(hub_client.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 5000)
    return families.publish(hub, local)


def merge(token, method="average", experts=EXPERTS, **options):
    return mats_hub.merge(experts, base="alice/base", method=method, token=token, stream=True, **options)


def tensors_of(merged):
    return {path.relative_to(merged.folder): path.read_bytes() for path in merged.folder.rglob("*.safetensors")}


def weights_on_disk() -> list[Path]:
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    return [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size > 20_000]


@pytest.mark.parametrize("method", ["average", "ties", "dare"])
def test_the_merge_is_the_same_and_no_expert_is_on_disk(hub, token, method):
    merged = merge(token, method)
    assert not weights_on_disk()
    assert tensors_of(merged) == tensors_of(mats_hub.merge(EXPERTS, base="alice/base", method=method, token=token))


def test_a_reading_fetches_every_byte_once(hub, token, local):
    size = sum(Path(folder, WEIGHTS).stat().st_size for folder in (local.base, *local.experts))
    plan = mats_hub.make_plan(mats_hub.Recipe.build(EXPERTS, base="alice/base", method="ties"), token, stream=True)
    planned, before = plan.bytes_to_fetch, hub.downloaded(WEIGHTS)
    headers = before  # what the plan read
    merge(token, "ties")
    assert planned == 3 * size
    assert hub.downloaded(WEIGHTS) - before - headers == pytest.approx(planned, rel=0.05)


def test_what_is_on_this_machine_is_taken_from_there(hub, token):
    source.open_source("alice/alpha", token).path(WEIGHTS)
    hub.requests.clear()
    merge(token)
    assert not hub.downloaded(f"alice/alpha/.*/{WEIGHTS}")


def test_files_of_another_order_and_other_shards(hub, token, local):
    tensors = load_file(Path(local.root, "beta", WEIGHTS))
    names, index = sorted(tensors, reverse=True), {}
    content = {name: path.read_bytes() for name in ("config.json",) if (path := Path(local.root, "beta", name))}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        # Wider dtypes go first in a file: one part is stored in float64. The header takes more than a chunk.
        part_tensors = {name: tensors[name].double() if number == 2 else tensors[name] for name in part}
        save_file(part_tensors, local.root / file, {"format": "pt", "padding": "x" * 20_000})
        content[file] = (local.root / file).read_bytes()
        index |= dict.fromkeys(part, file)
    content["model.safetensors.index.json"] = json.dumps({"weight_map": index}).encode()
    hub.create("alice/other", content)
    experts = ["alice/alpha", {"model": "alice/other", "name": "beta"}]
    streamed = merge(token, "task_arithmetic", experts)
    assert not weights_on_disk()
    stored = mats_hub.merge(experts, base="alice/base", method="task_arithmetic", token=token)
    assert tensors_of(streamed) == tensors_of(stored)


PASSING = {
    "busy": {"kind": "status", "status": 429, "headers": {"Retry-After": "3"}},
    "unavailable": {"kind": "status", "status": 503},
    "hung up": {"kind": "drop"},
    "cut": {"kind": "truncate", "after": 900},
    "reset": {"kind": "reset", "after": 900},
    "slow": {"kind": "delay", "seconds": 0.3},
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_changes_nothing(hub, token, local, name):
    expected = mats_hub.merge(local.experts, base=local.base, method="average")
    fault = hub.fault(**PASSING[name], path=WEIGHTS, host="files", times=2)
    merged = merge(token)
    assert fault.hits == 2
    ours, theirs = (load_file(m.folder / WEIGHTS) for m in (merged, expected))
    assert all(bool((ours[key] == theirs[key]).all()) for key in theirs)


@pytest.fixture
def after_planning(hub, monkeypatch):
    """Let something go wrong once the plan is made."""

    def arm(*args, **options):
        def check(plan, *rest, check=mats_hub.Plan.shortages):
            hub.fault(*args, **{"path": f"{WEIGHTS}$", "host": "files", **options})
            return check(plan, *rest)

        monkeypatch.setattr(mats_hub.Plan, "shortages", check)

    return arm


@pytest.mark.parametrize("reading", [1, 2, 3])
def test_a_flipped_bit_in_any_reading_is_noticed(hub, token, tmp_path, monkeypatch, after_planning, reading):
    begun = []

    def finish(plan, finish=mats_hub.Plan.finish_reading):
        finish(plan)
        begun.append(plan)
        if len(begun) == reading - 1:
            hub.fault("flip", path=f"{WEIGHTS}$", host="files", after=4900)

    if reading == 1:
        after_planning("flip", after=4900)
    monkeypatch.setattr(mats_hub.Plan, "finish_reading", finish)
    with pytest.raises(SourceError, match=r"came with other bytes than the (Hub says|first time)"):
        merge(token, "ties", output=tmp_path / "merged")
    assert len(begun) == reading - 1
    assert not list(tmp_path.glob("*merged*/**/*.safetensors"))


def test_what_nobody_reads_is_checked_too(hub, token, monkeypatch):
    """A flipped bit in a tensor that the recipe leaves out means that the file is not the one the Hub speaks of."""

    def finish(plan, finish=mats_hub.Plan.finish_reading):
        hub.fault("flip", path=f"{WEIGHTS}$", host="files")
        finish(plan)

    monkeypatch.setattr(mats_hub.Plan, "finish_reading", finish)
    with pytest.raises(SourceError, match="other bytes"):
        merge(token, include=["*layer.0.attention*"])


def test_a_lasting_fault_is_an_error(hub, token, tmp_path, after_planning):
    after_planning("status", status=503, times=None)
    with pytest.raises(MatsError, match="the Hub answered 503"):
        merge(token, output=tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def test_a_server_that_sends_no_parts(hub, token, after_planning):
    after_planning("status", status=200, times=None)
    with pytest.raises(SourceError, match="sends no parts of files; leave out --stream"):
        merge(token)


def test_from_the_command_line(hub, token, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    assert main(["plan", *EXPERTS, "--base", "alice/base", "--method", "ties", "--stream"]) == 0
    assert "to stream, in 3 readings:" in capsys.readouterr().out
    target = tmp_path / "merged"
    assert main(["merge", *EXPERTS, "--base", "alice/base", "--stream", "--output", str(target)]) == 0
    assert main(["push", str(target), "alice/merged"]) == 0
    assert main(["replay", "alice/merged", "--check", "--stream"]) == 0
    assert not [path for path in weights_on_disk() if "alice--merged" not in str(path)]
