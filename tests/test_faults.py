"""What goes wrong between here and the Hub: the right result or a clear error, and nothing wrong is left behind."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import family as families
import huggingface_hub
import pytest
from safetensors.torch import load_file

import mats_hub
from mats_hub import hub as pushing
from mats_hub import hub_client, source
from mats_hub.cli import main
from mats_hub.errors import HubError, MatsError, SourceError

WEIGHTS = "model.safetensors"
EXPERTS = [f"alice/{name}" for name in families.LABELS]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return families.make_family(tmp_path_factory.mktemp("family"), card=families.EXPERT_CARD)


@pytest.fixture
def token(hub, local, monkeypatch):
    """Put the family on the Hub as alice's and return her token; waiting between tries takes no time."""
    token = families.publish(hub, local)
    monkeypatch.setattr(hub_client.time, "sleep", lambda seconds: None)
    return token


@pytest.fixture(scope="module")
def expected(local):
    merged = mats_hub.merge(local.experts, base=local.base, method="average")
    return load_file(merged.folder / WEIGHTS)


def assert_same(merged, expected) -> None:
    tensors = load_file(merged.folder / WEIGHTS)
    assert tensors.keys() == expected.keys()
    assert all(bool((tensors[key] == value).all()) for key, value in expected.items())


def merge(token):
    return mats_hub.merge(EXPERTS, base="alice/base", method="average", token=token)


# --- fetching

PASSING = {
    "busy": {"kind": "status", "status": 429, "headers": {"Retry-After": "3"}, "path": "/resolve/", "method": "GET"},
    "unavailable, asked": {"kind": "status", "status": 503, "path": "/resolve/", "method": "HEAD"},
    "unavailable, fetched": {"kind": "status", "status": 503, "path": WEIGHTS, "host": "files"},
    "hung up": {"kind": "drop", "path": "/resolve/", "method": "GET"},
    "cut in mid-file": {"kind": "truncate", "path": WEIGHTS, "host": "files", "after": 9000},
    "reset in mid-file": {"kind": "reset", "path": WEIGHTS, "host": "files", "after": 9000},
    "reset at the start": {"kind": "reset", "path": WEIGHTS, "host": "files", "after": 0},
    "a flipped bit": {"kind": "flip", "path": WEIGHTS, "host": "files"},
    "slow": {"kind": "delay", "path": WEIGHTS, "host": "files", "seconds": 0.3},
}


@pytest.mark.parametrize("name", PASSING)
@pytest.mark.parametrize("times", [1, 2])
def test_what_passes_changes_nothing(hub, token, expected, name, times):
    fault = hub.fault(**PASSING[name], times=times)
    assert_same(merge(token), expected)
    assert fault.hits == times


def cached() -> list[Path]:
    return [path for path in Path(huggingface_hub.constants.HF_HUB_CACHE).rglob(f"*{WEIGHTS}*") if path.exists()]


LASTING = {
    "a flipped bit": r"model\.safetensors came with other bytes than the Hub says it has, 3 times",
    "unavailable, fetched": r"the Hub answered 503",
    "reset in mid-file": r"cannot reach the Hub",
}


@pytest.mark.parametrize("name", LASTING)
def test_what_lasts_is_an_error_and_no_wrong_file_stays(hub, token, expected, name):
    hub.fault(**PASSING[name], times=None)
    with pytest.raises(MatsError, match=LASTING[name]):
        merge(token)
    hub.faults.clear()
    blobs = [
        path for path in Path(huggingface_hub.constants.HF_HUB_CACHE).rglob("blobs/*") if path.stat().st_size > 9000
    ]
    assert not cached()
    assert not blobs
    assert_same(merge(token), expected)


def test_a_model_is_loaded_from_checked_bytes(hub, token):
    fault = hub.fault("flip", path=WEIGHTS, host="files")
    model = mats_hub.load("alice/alpha", token=token)
    assert fault.hits == 1
    path = source.open_source("alice/alpha", token).path(WEIGHTS)
    assert source.file_sha256(path) == source.open_source("alice/alpha", token).digests[WEIGHTS]
    assert model.config.num_labels == 2


def test_what_is_cached_is_not_read_through_again(hub, token, monkeypatch):
    merge(token)
    read: list[Path] = []
    monkeypatch.setattr(source, "file_sha256", lambda path: read.append(path) or "")
    opened = source.open_source("alice/alpha", token)
    opened.path(WEIGHTS)
    assert not read


# --- pushing


@pytest.fixture
def merged(token):
    return merge(token)


def test_a_lost_answer_is_told_from_a_commit_that_was_not_made(hub, token, merged):
    merged.push_to_hub("alice/merged", token=token)
    merged.add_results([{"task": "alpha", "metric": "accuracy", "model": "merged", "value": 0.5, "dataset": "d"}])
    before = len(hub.commits("alice/merged"))
    fault = hub.fault("lost", path="/commit/main", method="POST")
    url = merged.push_to_hub("alice/merged", token=token)
    assert fault.hits == 1
    assert len(hub.commits("alice/merged")) == before + 1
    assert url.endswith(hub.commits("alice/merged")[0].sha)
    assert "0.5" in hub.files("alice/merged")["README.md"].decode()


@pytest.mark.parametrize("fault", [{"kind": "drop"}, {"kind": "status", "status": 503}])
def test_a_commit_that_was_not_made_is_an_error_and_can_be_made_again(hub, token, merged, fault):
    hub.create("alice/merged")
    hub.fault(**fault, path="/commit/main", method="POST")
    with pytest.raises(HubError, match=r"alice/merged"):
        merged.push_to_hub("alice/merged", token=token)
    assert len(hub.commits("alice/merged")) == 1
    assert hub.files("alice/merged").keys() == {".gitattributes"}
    merged.push_to_hub("alice/merged", token=token)
    assert WEIGHTS in hub.files("alice/merged")


def test_a_commit_of_somebody_else_meanwhile_is_told_and_kept(hub, token, merged):
    hub.create("alice/merged")
    hub.fault("delay", path="/commit/main", method="POST", seconds=1.0)

    def commit() -> None:
        while not hub.seen("/preupload/"):
            time.sleep(0.01)
        hub.commit("alice/merged", {"theirs.txt": b"theirs"})

    thread = threading.Thread(target=commit)
    thread.start()
    with pytest.raises(HubError, match=r"somebody else committed to the branch meanwhile"):
        merged.push_to_hub("alice/merged", token=token)
    thread.join()
    assert hub.files("alice/merged").keys() == {".gitattributes", "theirs.txt"}


def test_an_upload_that_arrives_changed_is_not_published(hub, token, merged):
    hub.create("alice/merged")
    hub.fault("flip", method="PUT", host="files")
    with pytest.raises(HubError):
        merged.push_to_hub("alice/merged", token=token)
    assert hub.files("alice/merged").keys() == {".gitattributes"}
    merged.push_to_hub("alice/merged", token=token)


def test_what_the_hub_holds_is_read_back(hub, token, merged, monkeypatch):
    add = pushing._differing
    monkeypatch.setattr(pushing, "_differing", lambda *arguments: [*add(*arguments), "model.safetensors"])
    with pytest.raises(HubError, match=r"other bytes than were sent of model\.safetensors"):
        merged.push_to_hub("alice/merged", token=token)
    operations = [
        huggingface_hub.CommitOperationAdd(name, data + (b"x" if name in (WEIGHTS, "README.md") else b""))
        for name, data in hub.files("alice/merged").items()
    ]
    operations.append(huggingface_hub.CommitOperationAdd("missing.txt", b""))
    api = huggingface_hub.HfApi(token=token)
    assert set(add(api, "alice/merged", operations, "main")) == {WEIGHTS, "README.md", "missing.txt"}


def test_rights_are_checked_before_anything_is_fetched(hub, token, tmp_path, capsys, monkeypatch):
    hub.add_user("bob")
    reader = hub.add_user("carol", role="read")
    hub.create("bob/his")
    for whose, target, message in (
        (token, "bob/his", "403"),
        (token, "bob/new", "you are 'alice' and may not make a repository of 'bob'"),
        (reader, "carol/new", "may only read"),
        (False, "alice/new", "hf auth login"),
        (token, "../x", "no Hub id"),
    ):
        with pytest.raises(HubError, match=message):
            pushing.check_can_push(target, whose)
    pushing.check_can_push("alice/new", token)
    pushing.check_can_push("alice/alpha", token)
    status = main(["merge", *EXPERTS, "--base", "alice/base", "--method", "average", "--output", str(tmp_path / "out"),
                   "--push", "bob/his"])  # fmt: skip
    assert status == 1
    assert "bob/his" in capsys.readouterr().err
    assert hub.downloaded() == 0
    assert not (tmp_path / "out").exists()


def test_the_errors_of_a_source_are_ours():
    with pytest.raises(SourceError):
        source.open_source("alice/never-was", False)


def test_a_card_that_cannot_be_checked_is_not_called_a_bad_one(hub, token, merged):
    hub.fault("status", path="/api/validate-yaml", status=503)
    with pytest.raises(HubError, match=r"cannot be checked: the Hub answered 503"):
        merged.push_to_hub("alice/merged", token=token)
    hub.fault("drop", path="/api/validate-yaml")
    with pytest.raises(HubError, match=r"cannot reach the Hub"):
        merged.push_to_hub("alice/merged", token=token)
    assert hub.find("alice/merged") is None


# --- sending files while the merge goes on


def test_shards_are_sent_as_they_are_finished_and_published_in_one_commit(hub, token):
    upload, seen = pushing.Upload("alice/merged", token=token), []

    def on_file(path):
        upload.add(path)
        upload.finished()
        seen.append((path.name, len(hub.seen(method="PUT", host="files")), hub.files("alice/merged").keys()))

    merged = mats_hub.merge(
        EXPERTS, base="alice/base", method="average", token=token, max_shard_size="8KB", on_file=on_file
    )
    shards = sorted(merged.report.files)
    assert len(shards) > 2
    assert [name for name, *_ in seen] == shards
    assert [count for _, count, _ in seen] == list(range(1, len(shards) + 1))
    assert all(files == {".gitattributes"} for *_, files in seen)
    merged.push_to_hub("alice/merged", token=token, upload=upload)
    assert len(hub.commits("alice/merged")) == 2
    puts = [request.path for request in hub.seen(method="PUT", host="files")]
    assert len(puts) == len(set(puts)), "nothing is sent twice"
    files = hub.files("alice/merged")
    assert all(files[name] == (merged.folder / name).read_bytes() for name in shards)


def test_a_shard_that_could_not_be_sent_is_sent_in_the_end(hub, token):
    upload = pushing.Upload("alice/merged", token=token)
    hub.fault("status", status=500, path="/preupload/", method="POST", times=None)
    merged = mats_hub.merge(EXPERTS, base="alice/base", method="average", token=token, on_file=upload.add)
    assert upload.finished() == {}
    hub.faults.clear()
    merged.push_to_hub("alice/merged", token=token, upload=upload)
    assert hub.files("alice/merged")[WEIGHTS] == (merged.folder / WEIGHTS).read_bytes()
