"""The loss of masked autoencoding in training, which predicts the hidden patches alone, against the
one of the whole image.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from published_mae import reconstruction_loss
from torch import Tensor

from vitdistill.data.batch import Batch
from vitdistill.methods.mae import PixelReconstruction
from vitdistill.methods.masking import random_masking
from vitdistill.models.mae import MAEDecoder
from vitdistill.vit.network import Network
from vitdistill.vit.output import ViTOutput


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 3),
    columns=st.integers(2, 4),
    rate=st.sampled_from([0.0, 0.3, 0.5, 0.75]),
    prefix=st.integers(0, 2),
    depth=st.integers(1, 3),
    norm_pix=st.booleans(),
)
def test_the_loss_of_training_is_the_published_one(
    seed: int, rows: int, columns: int, rate: float, prefix: int, depth: int, norm_pix: bool
) -> None:
    """Value and gradients in float64, whatever is hidden."""
    torch.manual_seed(seed)
    if int(rows * columns * (1 - rate)) < 1:
        rate = 0.5
    objective = PixelReconstruction(
        decoder_dim=8, decoder_depth=depth, decoder_num_heads=2, norm_pix=norm_pix
    )
    decoder = MAEDecoder(6, (rows, columns), (2, 3), 8, depth, 2).double()
    keep, _, mask = random_masking(torch.rand(2, rows * columns), rate)
    images = torch.randn(2, 3, 2 * rows, 3 * columns, dtype=torch.float64)
    features = torch.randn(2, prefix + keep.shape[1], 6, dtype=torch.float64, requires_grad=True)
    output: Any = ViTOutput(
        features=features,
        keep=keep,
        grid=(rows, columns),
        network=Network(num_prefix_tokens=prefix, depth=1),
    )
    ids = torch.arange(2)
    trained = objective.loss(output, None, Batch(images, ids, ids, ids, 0), decoder)
    published = reconstruction_loss(decoder(features, keep, prefix), images, mask, (2, 3), norm_pix)
    assert trained.item() == pytest.approx(published.item(), rel=1e-9, abs=1e-12)

    def gradients(loss: Tensor) -> list[Tensor]:
        wanted = [features, *(p for p in decoder.parameters() if p.requires_grad)]
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)]

    for ours, theirs in zip(gradients(trained), gradients(published), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-7, atol=1e-12)
