"""Where experts agree: cosines and sign conflicts against their definitions, as a table and from the command line."""

from __future__ import annotations

import family as families
import pytest
import torch
from safetensors.torch import load_file, save_file

import mats_hub
from mats_hub.cli import main
from mats_hub.conflict import by_layer, draw, table
from mats_hub.errors import PlanError


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    family = families.make_family(tmp_path_factory.mktemp("family"))
    path = family.root / "beta" / "model.safetensors"  # so that some entries are nobody's, or one expert's alone
    tensors, base = load_file(path), load_file(family.root / "base" / "model.safetensors")
    for key, tensor in tensors.items():
        if key.removeprefix("bert.") in base:
            tensor.view(-1)[::3] = base[key.removeprefix("bert.")].view(-1)[::3]
    save_file(tensors, path, {"format": "pt"})
    return family


def test_cosines_and_conflicts_are_what_they_are_defined_as(local):
    found = {one.name: one for one in mats_hub.agreement(local.experts, base=local.base, device="cpu")}
    base = load_file(local.root / "base" / "model.safetensors")
    held = [load_file(local.root / name / "model.safetensors") for name in families.LABELS]
    assert found
    for name, one in found.items():
        assert one.experts == tuple(families.LABELS)
        key = name.removeprefix("bert.")
        deltas = [(expert[f"bert.{key}"].double() - base[key].double()).flatten() for expert in held]
        for i, left in enumerate(deltas):
            for j, right in enumerate(deltas):
                cosine = torch.cosine_similarity(left, right, dim=0)
                both = (left != 0) & (right != 0)
                opposed = ((left * right < 0).sum() / both.sum()).item()
                assert one.cosines[i, j].item() == pytest.approx(cosine.item(), abs=1e-5)
                assert one.conflicts[i, j].item() == pytest.approx(opposed, abs=1e-6)
                assert one.shared[i, j].item() == both.sum().item()


def test_layers_are_sums_over_their_tensors(local):
    found = mats_hub.agreement(local.experts, base=local.base, device="cpu")
    layers = {layer.name: layer for layer in by_layer(found)}
    first = [one for one in found if ".layer.0." in one.name]
    assert len(first) > 10
    torch.testing.assert_close(layers["layer 0"].products, torch.stack([one.products for one in first]).sum(0))
    torch.testing.assert_close(sum(la.shared for la in layers.values()), sum(one.shared for one in found))


def test_the_command_prints_a_line_for_each_layer_and_draws(local, tmp_path, capsys):
    figure = tmp_path / "maps.png"
    assert main(["agreement", *local.experts, "--base", local.base, "--device", "cpu", "--figure", str(figure)]) == 0
    said = capsys.readouterr().out
    layers = by_layer(mats_hub.agreement(local.experts, base=local.base, device="cpu"))
    assert said.startswith(table(layers))
    first = next(layer for layer in layers if layer.name == "layer 0")
    line = next(line for line in said.splitlines() if line.startswith("layer 0"))
    assert line.split()[2:4] == [f"{float(first.cosines[0, 1]):+.2f}", f"{float(first.conflicts[0, 1]):.0%}"]
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_an_expert_alone_and_experts_without_a_base(local, tmp_path):
    [alone, *_] = local.experts
    layers = by_layer(mats_hub.agreement([alone], base=local.base, device="cpu"))
    assert "one expert alone" in table(layers)
    draw(layers, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    with pytest.raises(PlanError, match="base"):
        mats_hub.agreement(local.experts)
