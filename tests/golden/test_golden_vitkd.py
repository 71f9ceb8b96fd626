"""The numbers of the authors' code (yzd-v/cls_KD@ad4876f), to 1e-5."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vitdistill.methods.vitkd import ViTKDAdapter, vitkd_loss

HERE = Path(__file__).parent
EXPECTED = json.loads((HERE / "expected.json").read_text())

with np.load(HERE / "vitkd.npz") as data:
    DATA = {key: torch.from_numpy(data[key]) for key in data.files}


def adapter() -> ViTKDAdapter:
    """The authors' parameters under our names."""
    ours = {}
    for key, value in DATA.items():
        if key.startswith("P."):
            ours[
                key.removeprefix("P.")
                .replace("align2.", "align_low.")
                .replace("align.", "align_high.")
            ] = value
    made = ViTKDAdapter(8, 12)
    made.load_state_dict(ours)
    return made


@torch.no_grad()
def test_losses() -> None:
    low, high = vitkd_loss(
        adapter(), DATA["low_s"], DATA["high_s"], DATA["low_t"], DATA["high_t"], noise=DATA["noise"]
    )
    assert low.item() == pytest.approx(EXPECTED["vitkd low"], rel=1e-5)
    assert high.item() == pytest.approx(EXPECTED["vitkd high"], rel=1e-5)
