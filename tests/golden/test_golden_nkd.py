"""The numbers of the authors' code (yzd-v/cls_KD@ad4876f), to 1e-5."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from vitdistill.methods.nkd import nkd_loss

HERE = Path(__file__).parent
EXPECTED = json.loads((HERE / "expected.json").read_text())["nkd(gamma=1, temperature=1)"]

with np.load(HERE / "kd_nkd.npz") as data:
    STUDENT, TEACHER, LABELS = (
        torch.from_numpy(data[key]) for key in ("student_logits", "teacher_logits", "labels")
    )


def test_loss() -> None:
    assert (
        abs(nkd_loss(STUDENT, TEACHER, LABELS, gamma=1.0, temperature=1.0).item() - EXPECTED) < 1e-5
    )


def test_loss_of_soft_labels() -> None:
    """As their code is given labels with Mixup: the dominant class is the target."""
    soft = 0.9 * F.one_hot(LABELS, 10).float() + 0.01
    assert abs(nkd_loss(STUDENT, TEACHER, soft).item() - EXPECTED) < 1e-5
