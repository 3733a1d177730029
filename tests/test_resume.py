"""A merge that was killed goes on where it was; several processes write what one would."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import family as families
import pytest

import mats_hub
from mats_hub import streaming
from mats_hub.cli import main
from mats_hub.errors import OutputError, WrongBytes
from mats_hub.statistics import compute_statistics

OPTIONS = {"method": "ties", "max_shard_size": "8KB"}
INTERRUPTED = """
import json, os, signal, sys
import mats_hub
signal.signal(signal.SIGINT, signal.default_int_handler)  # what was begun in the background ignores it
experts, output, options, after, number = json.loads(sys.argv[1])
count = 0
def on_file(path):
    global count
    count += 1
    if count == after:
        os.kill(os.getpid(), number)
mats_hub.merge(experts, output=output, on_file=on_file, **options)
"""


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return families.make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def whole(local, tmp_path_factory):
    """Merge without an interruption."""
    target = tmp_path_factory.mktemp("whole") / "out"
    mats_hub.merge(local.experts, base=local.base, output=target, **OPTIONS)
    return target


def weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors*")}


def interrupt(local, output: Path, after: int, number: int = signal.SIGKILL, **options) -> subprocess.CompletedProcess:
    """Merge in a process that gets a signal when so many files are finished."""
    told = json.dumps([local.experts, str(output), {"base": local.base, **OPTIONS, **options}, after, number])
    return subprocess.run([sys.executable, "-c", INTERRUPTED, told], check=False, capture_output=True, text=True)


@pytest.mark.parametrize("after", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_merge_goes_on_and_ends_with_the_same_bytes(local, whole, tmp_path, after):
    output, made = tmp_path / "out", []
    assert interrupt(local, output, after).returncode == -signal.SIGKILL
    assert not output.exists()
    mats_hub.merge(local.experts, base=local.base, output=output, watch=made.append, **OPTIONS)
    assert weights(output) == weights(whole)
    report, expected = (mats_hub.MergedModel.open(folder).report for folder in (output, whole))
    assert report.tensors == expected.tensors
    assert report.files == expected.files
    there = sorted(path.name for path in whole.glob("model-*.safetensors"))
    kept = {entry for name in there[:after] for entry in names_in(whole / name)}
    assert {record.key for record in made} == {entry for name in there for entry in names_in(whole / name)} - kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def names_in(path: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def test_ctrl_c_says_how_to_go_on(local, whole, tmp_path):
    run = interrupt(local, tmp_path / "out", 2, signal.SIGINT)
    assert "KeyboardInterrupt" in run.stderr
    assert "What is finished is kept in" in run.stderr
    assert not (tmp_path / "out").exists()
    mats_hub.merge(local.experts, base=local.base, output=tmp_path / "out", **OPTIONS)
    assert weights(tmp_path / "out") == weights(whole)


LOCKED = """
import json, os, sys
import mats_hub
experts, output, options, stage = json.loads(sys.argv[1])
os.makedirs(stage)
mats_hub.merge(experts, output=output, on_file=lambda path: os.chmod(stage, 0o500), **options)
"""


def test_a_folder_that_can_no_longer_be_written_is_an_error_and_what_is_finished_is_kept(local, whole, tmp_path):
    output, stage = tmp_path / "out", tmp_path / ".out.partial"
    told = json.dumps([local.experts, str(output), {"base": local.base, **OPTIONS}, str(stage)])
    # What an administrator may write is not a matter of a folder's mode, unless that right is given up.
    ordinary = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    if ordinary and subprocess.run([*ordinary, "true"], check=False, capture_output=True).returncode:
        pytest.skip("the administrator's rights cannot be given up here")
    run = subprocess.run([*ordinary, sys.executable, "-c", LOCKED, told], check=False, capture_output=True, text=True)
    assert "OutputError: cannot write" in run.stderr
    assert "Permission denied" in run.stderr
    assert "the same merge, run again, goes on from there" in run.stderr
    assert not output.exists()
    stage.chmod(0o700)
    mats_hub.merge(local.experts, base=local.base, output=output, **OPTIONS)
    assert weights(output) == weights(whole)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Kill a merge after two files; return its family and the folder it was merging into."""
    root = tmp_path_factory.mktemp("interrupted")
    family = families.make_family(root / "family")
    interrupt(family, root / "out", 2)
    return family, root


@pytest.mark.parametrize("change", ["recipe", "shard", "journal", "expert"])  # an expert is changed for good: the last
def test_what_was_finished_for_something_else_is_not_taken_up(interrupted, tmp_path, change):
    (family, root), options, made = interrupted, dict(OPTIONS), []
    stage = shutil.copytree(root / ".out.partial", tmp_path / ".out.partial")
    (stage / "tasks/alpha").mkdir(parents=True)  # as if it was killed while the rest was written
    (stage / "model-00001-of-00099.safetensors").write_bytes(b"of another layout")
    if change == "recipe":
        options["density"] = 0.5
    elif change == "expert":
        families.save_expert(family, "alpha", 2, seed=77)
    elif change == "shard":
        with sorted(stage.glob("model-*.safetensors"))[0].open("r+b") as file:
            file.seek(-3, os.SEEK_END)
            file.write(b"\xff")
    else:
        (stage / "mats_progress.json").write_text("{")
    merged = mats_hub.merge(family.experts, base=family.base, output=tmp_path / "out", watch=made.append, **options)
    fresh = mats_hub.merge(family.experts, base=family.base, output=tmp_path / "fresh", **options)
    assert weights(merged.folder) == weights(fresh.folder)
    names = [sorted(str(path.relative_to(m.folder)) for path in m.folder.rglob("*")) for m in (merged, fresh)]
    assert names[0] == names[1]
    assert (len(made) < len(fresh.report.tensors)) == (change == "shard"), "the shard that was not damaged is kept"


def test_a_failure_before_the_first_file_leaves_nothing(local, tmp_path):
    def fail(record):
        raise RuntimeError("a cable was pulled")

    with pytest.raises(RuntimeError, match="cable"):
        mats_hub.merge(local.experts, base=local.base, output=tmp_path / "out", watch=fail, method="average")
    assert not list(tmp_path.iterdir())


def test_two_merges_into_one_folder(local, tmp_path):
    def again(record):
        mats_hub.merge(local.experts, base=local.base, output=tmp_path / "out", **OPTIONS)

    with pytest.raises(OutputError, match="another process is writing"):
        mats_hub.merge(local.experts, base=local.base, output=tmp_path / "out", watch=again, **OPTIONS)


def test_a_streamed_merge_goes_on_and_bytes_of_the_first_run_are_checked(hub, local, tmp_path, monkeypatch):
    token = families.publish(hub, local)
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 5000)
    experts = [f"alice/{name}" for name in families.LABELS]

    def merge(output, **options):
        return mats_hub.merge(experts, base="alice/base", output=output, token=token, stream=True, **options)

    def stop(path):
        raise KeyboardInterrupt

    def cut(output):
        with pytest.raises(KeyboardInterrupt):
            merge(output, on_file=stop, method="average", max_shard_size="8KB")

    cut(tmp_path / "out")
    merged = merge(tmp_path / "out", method="average", max_shard_size="8KB")
    fresh = merge(tmp_path / "fresh", method="average", max_shard_size="8KB")
    assert weights(merged.folder) == weights(fresh.folder)

    def armed(plan, *rest, check=mats_hub.Plan.shortages):
        hub.fault("flip", path="model.safetensors$", host="files", after=4990)
        return check(plan, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(mats_hub.Plan, "shortages", armed)
        patch.setattr(streaming, "AHEAD", 0)  # so that what is flipped is used
        cut(tmp_path / "again")
    with pytest.raises(WrongBytes, match="other bytes than the first time"):
        merge(tmp_path / "again", method="average", max_shard_size="8KB")
    assert not list(tmp_path.glob(".again*"))


# --- several processes


def torchrun(count: int, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return subprocess.run([*command, *arguments], check=False, capture_output=True, text=True)


@pytest.fixture(scope="module")
def measured(local):
    for name, folder in zip(families.LABELS, local.experts, strict=True):
        compute_statistics(
            folder, dataset=str(local.data(name)), kind="kfac", output=f"{folder}/statistics.safetensors"
        )
    return local


@pytest.mark.parametrize(("count", "method"), [(3, "ties"), pytest.param(2, "mats", marks=pytest.mark.slow)])
def test_several_processes_write_what_one_would(measured, tmp_path, count, method):
    flags = [*measured.experts, "--base", measured.base, "--method", method, "--max-shard-size", "8KB"]
    assert main(["merge", *flags, "--output", str(tmp_path / "one")]) == 0
    run = torchrun(count, "-m", "mats_hub", "merge", *flags, "--output", str(tmp_path / "several"))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("merged 3 experts") == 1
    assert weights(tmp_path / "several") == weights(tmp_path / "one")
    reports = [mats_hub.MergedModel.open(tmp_path / name).report for name in ("one", "several")]
    assert reports[0].tensors == reports[1].tensors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "several"]


@pytest.mark.slow
def test_a_process_that_dies_is_an_error_and_the_rest_is_kept(local, whole, tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(
        "import os, signal, sys\nimport mats_hub\nfrom mats_hub.processes import is_first\n"
        "count = 0\n"
        "def watch(record):\n"
        "    global count\n"
        "    count += 1\n"
        "    if not is_first() and count == 12:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"mats_hub.merge({local.experts!r}, base={local.base!r}, output={str(tmp_path / 'out')!r}, watch=watch, **{OPTIONS!r})\n"
    )
    run = torchrun(2, str(script))
    assert run.returncode != 0
    assert not (tmp_path / "out").exists()
    kept = list((tmp_path / ".out.partial").glob("model-*.safetensors"))
    assert kept
    mats_hub.merge(local.experts, base=local.base, output=tmp_path / "out", **OPTIONS)
    assert weights(tmp_path / "out") == weights(whole)
