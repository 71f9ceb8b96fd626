"""The numbers of the authors' code (effl-lab/MaskedKD@96d052d), to 1e-5."""

import json
from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from vitdistill.methods.kd import kd_loss
from vitdistill.methods.maskedkd import patch_saliency, select_patches
from vitdistill.vit.needs import Needs
from vitdistill.vit.walk import run_vit

HERE = Path(__file__).parent
EXPECTED = json.loads((HERE / "expected.json").read_text())


def _load(name: str) -> dict[str, torch.Tensor]:
    with np.load(HERE / name) as data:
        return {key: torch.from_numpy(data[key]) for key in data.files}


def _model(
    data: dict[str, torch.Tensor], which: str, dim: int, depth: int, heads: int
) -> VisionTransformer:
    model = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        num_classes=10,
        norm_layer=lambda width, **kwargs: torch.nn.LayerNorm(width, eps=1e-6, **kwargs),
    )
    model.load_state_dict(
        {key.removeprefix(f"{which}."): v for key, v in data.items() if key.startswith(f"{which}.")}
    )
    return model.eval()


def _sets(rows: torch.Tensor) -> list[set[int]]:
    return [set(row) for row in rows.tolist()]


def test_loss() -> None:
    data = _load("maskedkd.npz")
    loss = kd_loss(data["student_logits"], data["teacher_logits"], temperature=1.0)
    assert abs(loss.item() - EXPECTED["kd(temperature=1) on maskedkd.npz"]) < 1e-5


def test_selection() -> None:
    data = _load("maskedkd.npz")
    assert _sets(select_patches(data["attention"].float(), 6)) == _sets(data["kept"])


@torch.no_grad()
def test_networks() -> None:
    data = _load("maskedkd_model.npz")
    student, teacher = _model(data, "student", 24, 2, 3), _model(data, "teacher", 48, 3, 6)
    images = data["images"].float()
    output = run_vit(student, images, Needs(logits=True, attention=frozenset({-1})))
    assert torch.allclose(
        output.logits, torch.tensor(EXPECTED["maskedkd student_logits"]), atol=1e-5
    )
    assert torch.allclose(
        patch_saliency(output.attention[1]), torch.tensor(EXPECTED["maskedkd saliency"]), atol=1e-5
    )
    keep = select_patches(output.attention[1], 8)
    assert _sets(keep) == [
        set(row) for row in EXPECTED["maskedkd kept patches, keep 8 (compare as sets)"]
    ]
    answer = run_vit(teacher, images, Needs(logits=True), keep)
    assert torch.allclose(
        answer.logits, torch.tensor(EXPECTED["maskedkd teacher_logits keep 8"]), atol=1e-5
    )
