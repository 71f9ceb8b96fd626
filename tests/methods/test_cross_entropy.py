"""Cross-entropy: timm's, for every kind of label."""

import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor

from vitdistill.data.batch import Batch
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
OTHER = torch.tensor([1, 4, 0, 2, 3, 0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_it_equals_torch_and_timm(smoothing: float) -> None:
    loss = cross_entropy_loss(LOGITS, LABELS, smoothing=smoothing)
    assert torch.equal(loss, F.cross_entropy(LOGITS, LABELS, label_smoothing=smoothing))
    assert torch.allclose(loss, LabelSmoothingCrossEntropy(smoothing)(LOGITS, LABELS), atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_mixed_labels_equal_timms_mixup(mode: str, smoothing: float) -> None:
    """timm mixes each image with its mirror in the batch, and makes one soft label of both."""
    mixup = Mixup(
        mixup_alpha=0.8, cutmix_alpha=0.0, mode=mode, label_smoothing=smoothing, num_classes=5
    )
    images = (
        torch.eye(6).view(6, 1, 6, 1).repeat(1, 3, 1, 2)
    )  # image i is 1 in row i: how much of it is left is its lam
    mixed, targets = mixup(images.clone(), LABELS)
    lam = mixed[:, 0].diagonal()[0] if mode == "batch" else mixed[:, 0, :, 0].diagonal()
    lam = torch.as_tensor(lam).expand(6).contiguous()
    ours = cross_entropy_loss(LOGITS, LABELS, LABELS.flip(0), lam, smoothing)
    assert ours.item() == pytest.approx(SoftTargetCrossEntropy()(LOGITS, targets).item(), rel=1e-5)


def test_each_image_has_its_own_share() -> None:
    lam = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    chosen = torch.where(lam == 1, LABELS, OTHER)
    assert torch.allclose(
        cross_entropy_loss(LOGITS, LABELS, OTHER, lam), F.cross_entropy(LOGITS, chosen), atol=1e-6
    )


def test_the_head_of_the_class_token_learns_from_the_labels() -> None:
    heads = torch.stack([LOGITS, LOGITS.flip(1)], dim=1)
    student = ViTOutput(
        logits=heads.mean(1), head_logits=heads, network=Network(heads=("class", "distillation"))
    )
    batch = Batch(torch.zeros(6, 3, 4, 4), LABELS, LABELS, LABELS, 0)

    def loss(head: str) -> Tensor:
        return CrossEntropy(head=head).loss(student, None, batch, None)

    assert torch.equal(loss("auto"), F.cross_entropy(LOGITS, LABELS))
    assert torch.equal(loss("class"), loss("auto"))
    assert torch.equal(loss("distillation"), F.cross_entropy(LOGITS.flip(1), LABELS))
    assert torch.equal(loss("all"), F.cross_entropy(heads.mean(1), LABELS))


def test_a_mixed_batch_is_seen_as_such() -> None:
    lam = torch.full((6,), 0.25)
    batch = Batch(torch.zeros(6, 3, 4, 4), LABELS, LABELS, LABELS, 0, mixed_labels=OTHER, lam=lam)
    loss = CrossEntropy(smoothing=0.1).loss(ViTOutput(logits=LOGITS), None, batch, None)
    assert torch.equal(loss, cross_entropy_loss(LOGITS, LABELS, OTHER, lam, 0.1))


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
