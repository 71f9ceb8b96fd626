"""The numbers of the authors' code, to 1e-5: effl-lab/MaskedKD@96d052d, yzd-v/cls_KD@ad4876f."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vitdistill.methods.kd import kd_loss
from vitdistill.methods.maskedkd import patch_saliency, select_patches
from vitdistill.methods.nkd import nkd_loss
from vitdistill.methods.vitkd import ViTKDAdapter, vitkd_loss
from vitdistill.vit.needs import Needs
from vitdistill.vit.walk import run_vit

HERE = Path(__file__).parent
EXPECTED = json.loads((HERE / "expected.json").read_text())


def load(name: str) -> dict[str, Tensor]:
    with np.load(HERE / name) as data:
        return {key: torch.from_numpy(data[key]) for key in data.files}


def part(data: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): v for key, v in data.items() if key.startswith(prefix)}


def sets(rows: Tensor) -> list[set[int]]:
    return [set(row) for row in rows.tolist()]


def test_maskedkd() -> None:
    data = load("maskedkd.npz")
    loss = kd_loss(data["student_logits"], data["teacher_logits"], temperature=1.0)
    assert loss.item() == pytest.approx(EXPECTED["kd(temperature=1) on maskedkd.npz"], abs=1e-5)
    assert sets(select_patches(data["attention"].float(), 6)) == sets(data["kept"])


@torch.no_grad()
def test_networks_under_maskedkd() -> None:
    data = load("maskedkd_model.npz")
    models = {}
    for name, dim, depth, heads in (("student", 24, 2, 3), ("teacher", 48, 3, 6)):
        models[name] = VisionTransformer(
            img_size=32,
            patch_size=8,
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            num_classes=10,
            norm_layer=lambda width, **kwargs: torch.nn.LayerNorm(width, eps=1e-6, **kwargs),
        ).eval()
        models[name].load_state_dict(part(data, f"{name}."))
    images, needs = data["images"].float(), Needs(logits=True, attention=frozenset({-1}))
    output = run_vit(models["student"], images, needs)
    keep = select_patches(output.attention[1], 8)
    assert sets(keep) == [
        set(row) for row in EXPECTED["maskedkd kept patches, keep 8 (compare as sets)"]
    ]
    answer = run_vit(models["teacher"], images, Needs(logits=True), keep)
    found = {
        "maskedkd student_logits": output.logits,
        "maskedkd saliency": patch_saliency(output.attention[1]),
        "maskedkd teacher_logits keep 8": answer.logits,
    }
    for name, values in found.items():
        assert torch.allclose(values, torch.tensor(EXPECTED[name]), atol=1e-5), name


def test_nkd() -> None:
    """With Mixup their code is given soft labels, whose dominant class is the target."""
    data, expected = load("kd_nkd.npz"), EXPECTED["nkd(gamma=1, temperature=1)"]
    for labels in (data["labels"], 0.9 * F.one_hot(data["labels"], 10).float() + 0.01):
        loss = nkd_loss(data["student_logits"], data["teacher_logits"], labels)
        assert loss.item() == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_vitkd() -> None:
    data = load("vitkd.npz")
    adapter = ViTKDAdapter(8, 12)
    names = {"align2.": "align_low.", "align.": "align_high."}
    state = part(data, "P.")
    for theirs, ours in names.items():
        state = {key.replace(theirs, ours): value for key, value in state.items()}
    adapter.load_state_dict(state)
    features = (data[key] for key in ("low_s", "high_s", "low_t", "high_t"))
    low, high = vitkd_loss(adapter, *features, noise=data["noise"])
    assert low.item() == pytest.approx(EXPECTED["vitkd low"], rel=1e-5)
    assert high.item() == pytest.approx(EXPECTED["vitkd high"], rel=1e-5)
