"""Cross-entropy: timm's, for every kind of label; and which head is meant."""

import pytest
import torch
import torch.nn.functional as F
from logit_cases import labelled
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from vitdistill.methods.cross_entropy import (
    CrossEntropy,
    chosen_head,
    cross_entropy_loss,
    head_logits,
)
from vitdistill.vit.network import Network
from vitdistill.vit.output import ViTOutput

LOGITS = 3 * torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 4, 2, 1, 3, 2])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_it_equals_timms(smoothing: float) -> None:
    loss = cross_entropy_loss(LOGITS, LABELS, smoothing=smoothing)
    assert torch.allclose(loss, LabelSmoothingCrossEntropy(smoothing)(LOGITS, LABELS), atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_mixed_labels_equal_timms_mixup(mode: str, smoothing: float) -> None:
    """timm mixes each image with its mirror in the batch, and makes one soft label of both."""
    mixup = Mixup(
        mixup_alpha=0.8, cutmix_alpha=0.0, mode=mode, label_smoothing=smoothing, num_classes=5
    )
    # Image i is 1 in row i: how much of it is left is its lam.
    images = torch.eye(6).view(6, 1, 6, 1).repeat(1, 3, 1, 2)
    mixed, targets = mixup(images.clone(), LABELS)
    lam = mixed[:, 0].diagonal()[0] if mode == "batch" else mixed[:, 0, :, 0].diagonal()
    lam = torch.as_tensor(lam).expand(6).contiguous()
    expected = SoftTargetCrossEntropy()(LOGITS, targets).item()
    batch = labelled(LABELS, LABELS.flip(0), lam)
    loss = CrossEntropy(smoothing=smoothing).loss(ViTOutput(logits=LOGITS), None, batch, None)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_head_of_the_class_token_learns_from_the_labels() -> None:
    heads = torch.stack([LOGITS, LOGITS.flip(1)], dim=1)
    network = Network(heads=("class", "distillation"))
    student = ViTOutput(logits=heads.mean(1), head_logits=heads, network=network)
    loss = CrossEntropy().loss(student, None, labelled(LABELS), None)
    assert torch.equal(loss, F.cross_entropy(LOGITS, LABELS))


HEADS = ("class", "conv", "inv")


@pytest.mark.parametrize(
    ("heads", "head", "teacher", "chosen"),
    [
        (("class",), "auto", None, "class"),
        (("class",), "auto", "teacher", "class"),
        (("class",), "class", "teacher", "class"),
        (("class",), "all", None, "all"),
        (("class", "distillation"), "auto", None, "class"),
        (("class", "distillation"), "auto", "teacher", "distillation"),
        (("class", "distillation"), "class", "teacher", "class"),
        (HEADS, "auto", None, "class"),
        (HEADS, "auto", "inv", "inv"),
        (HEADS, "conv", "inv", "conv"),
        (HEADS, "all", "inv", "all"),
        (("class", "distillation", "inv"), "auto", "inv", "inv"),
    ],
)
def test_which_head_is_meant(
    heads: tuple[str, ...], head: str, teacher: str | None, chosen: str
) -> None:
    assert chosen_head(heads, head, teacher) == chosen
    every = torch.randn(2, len(heads), 4) if len(heads) > 1 else None
    output = ViTOutput(logits=torch.randn(2, 4), head_logits=every, network=Network(heads=heads))
    expected = output.logits if every is None or chosen == "all" else every[:, heads.index(chosen)]
    assert torch.equal(head_logits(output, head, teacher), expected)
