"""The same merge gives the same bytes: under other hash seeds, with other numbers of threads, in other parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import family as families
import pytest
import torch

import mats_hub
from mats_hub import reading, threads

IN_PARTS = {
    "average": {},
    "task_arithmetic": {"scale": 0.3},
    "ties": {"density": 0.3},
    "dare": {"seed": 3},
    "dare_ties": {"seed": 3},
    "consensus": {},
}
WHOLE = {"mats": {"curvature": "task_vector"}, "tsvm": {}, "breadcrumbs": {}, "della": {"seed": 3}, "knots": {}}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return families.make_family(tmp_path_factory.mktemp("family"))


def merged(local, method, **options):
    return mats_hub.merge(local.experts, base=local.base, method=method, device="cpu", **options).report


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2, "a merge leaves torch's threads as they were"
    torch.set_num_threads(before)


@pytest.mark.parametrize(("method", "options"), IN_PARTS.items(), ids=str)
def test_threads_and_parts_change_no_byte(local, two_threads, monkeypatch, method, options):
    several = merged(local, method, **options)
    monkeypatch.setattr(reading, "workers", lambda device: 1)
    one = merged(local, method, **options)
    assert one.files == several.files
    assert one.tensors == several.tensors, "nor what is said of them"
    monkeypatch.setattr(reading, "PART_ENTRIES", 97)
    assert merged(local, method, **options).files == several.files


@pytest.mark.parametrize(("method", "options"), WHOLE.items(), ids=str)
def test_small_tensors_merged_beside_each_other_have_the_same_bytes(local, two_threads, method, options):
    several = merged(local, method, **options)
    torch.set_num_threads(1)
    one = merged(local, method, **options)
    torch.set_num_threads(2)
    assert one.files == several.files
    assert one.tensors == several.tensors


def test_small_tensors_are_computed_with_one_thread_where_they_come_one_at_a_time(local, two_threads):
    plan = mats_hub.make_plan(mats_hub.Recipe.build(local.experts, base=local.base, method="average"))
    sizes = {"small": 1, "large": 2**40}
    for plan.streamed in (True, False):
        seen = reading.over_tensors(
            plan, list(sizes), sizes.__getitem__, torch.device("cpu"), lambda item: (item, torch.get_num_threads())
        )
        assert dict(seen) == {"small": 1, "large": 2}


SCRIPT = """
import json, sys
import mats_hub
base, experts, methods, output = json.loads(sys.argv[1])
for method, options in methods.items():
    mats_hub.merge(experts, base=base, method=method, device="cpu", output=f"{output}/{method}", **options)
"""


def test_the_interpreters_hash_seed_changes_no_byte_of_any_file(local, tmp_path):
    for seed in ("0", "1"):
        given = json.dumps([local.base, local.experts, IN_PARTS | WHOLE, str(tmp_path / seed)])
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT, given]
        subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": seed}, check=True)
    names = sorted(path.relative_to(tmp_path / "0") for path in (tmp_path / "0").rglob("*") if path.is_file())
    assert len(names) > 8 * len(IN_PARTS | WHOLE)
    assert all((tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes() for name in names)


def test_results_come_in_order_and_an_error_ends_what_is_not_begun():
    begun = []

    def square(number: int) -> int:
        begun.append(number)
        if number == 5:
            raise ValueError("five")
        return number * number

    assert list(threads.in_threads(lambda n: n * n, range(50), 4)) == [n * n for n in range(50)]
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="five"):
        list(threads.in_threads(square, range(1000), 3))
    assert len(begun) < 20
    assert torch.get_num_threads() == before
