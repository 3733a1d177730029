"""The demonstration, with a few training steps: the whole of it runs, offline, and leaves a complete folder."""

from __future__ import annotations

import pytest

import mats_hub
from mats_hub import demo
from mats_hub.errors import OutputError


def run(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lines: list[str] = []
    demo.run_demo(folder, "cpu", lambda items, total, description: items, lines.append)
    return "\n".join(lines)


def test_the_demo_runs_and_writes_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "BASE_STEPS", 4)
    monkeypatch.setattr(demo, "EXPERT_STEPS", 2)
    monkeypatch.setattr(demo, "DAMPINGS", (1.0, 0.1))
    text = run(tmp_path / "demo", monkeypatch)
    for method in ("the experts", "average", "ties", "regmean", "mats (merged)"):
        assert f"\n{method}" in text
    merged = mats_hub.MergedModel.open(tmp_path / "demo" / "merged")
    layer, patches, last_norm = 6 * 2 + 2 * 2, 2, 2  # six linear modules and two norms, each with a bias
    assert len(merged.report.solved) == 3 * layer + patches + last_norm
    assert len(merged.report.results) == 15
    for task in demo.TASKS:
        assert merged.load(task).config.id2label == dict(enumerate(demo.TASKS[task].labels))
        assert (tmp_path / "demo" / "experts" / task / "statistics.safetensors").exists()
    with pytest.raises(OutputError):
        run(tmp_path / "demo", monkeypatch)


@pytest.mark.slow
def test_the_demo_as_it_is_shows_mats_ahead_of_the_average(tmp_path, monkeypatch):
    run(tmp_path / "demo", monkeypatch)
    results = mats_hub.MergedModel.open(tmp_path / "demo" / "merged").report.results
    mean = {
        model: sum(r["value"] for r in results if r["model"] == model) / 3 for model in ("merged", "average", "expert")
    }
    assert mean["expert"] > 0.85
    assert mean["merged"] > mean["average"]
