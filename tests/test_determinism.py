"""The same merge gives the same bytes: under other hash seeds, with other numbers of threads, in other parts."""

from __future__ import annotations

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


SCRIPT = """
import json, sys
import mats_hub
base, experts, methods = json.loads(sys.argv[1])
for method, options in methods.items():
    print(mats_hub.merge(experts, base=base, method=method, device="cpu", **options).report.files)
"""


def test_the_interpreters_hash_seed_changes_no_byte(local):
    import json

    given = json.dumps([local.base, local.experts, IN_PARTS | WHOLE])
    said = []
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT, given],
            env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        said.append(run.stdout)
    assert said[0] == said[1]
    assert said[0].count("model.safetensors") == len(IN_PARTS | WHOLE)


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
