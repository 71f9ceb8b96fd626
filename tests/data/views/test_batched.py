"""Views made in batches: pure functions of their address, whoever shares the batch."""

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as TF

from vitdistill.data.augment import AUGMENTS, Augment, InputSpec
from vitdistill.data.order import Samples
from vitdistill.data.views.batched import BatchViews, can_batch
from vitdistill.data.views.single import normalize

SPEC = InputSpec((32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("augment", AUGMENTS.values())
def test_batched_views_depend_on_their_address_only(picture, stack, augment: Augment) -> None:
    size = (40, 36) if augment.crop == "rrc" else (32, 32)
    make = BatchViews(stack([picture(i, size) for i in range(12)]), augment, SPEC)
    ids, views = np.arange(12, dtype=np.int64), np.arange(12, dtype=np.int64) % 3

    def batched(ids: np.ndarray, views: np.ndarray) -> torch.Tensor:
        return make(Samples(ids, views, seed=5), torch.device("cpu"))

    together = batched(ids, views)
    assert together.shape == (12, 3, 32, 32) and together.dtype == torch.uint8
    order = np.random.default_rng(0).permutation(12)
    assert torch.equal(batched(ids[order], views[order]), together[torch.from_numpy(order)])
    for i in range(12):
        assert torch.equal(batched(ids[i : i + 1], views[i : i + 1])[0], together[i])
    if augment is not AUGMENTS["none"]:
        assert not torch.equal(batched(ids, views + 1), together)
    with torch.autocast("cpu", torch.bfloat16):  # which does not reach the views
        inside = normalize(batched(ids, views), SPEC)
    assert torch.equal(inside, normalize(together, SPEC))


def test_batched_small_recipe_is_a_crop_and_a_flip(picture, stack) -> None:
    shown = Samples(np.zeros(400, dtype=np.int64), np.arange(400, dtype=np.int64), seed=5)
    made = BatchViews(stack([picture(0)]), AUGMENTS["small"], SPEC)(shown, torch.device("cpu"))
    padded = TF.pil_to_tensor(TF.pad(picture(0), 4))
    windows = padded.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    windows = torch.cat([windows, windows.flip(-1)]).flatten(1)
    match = (made.flatten(1)[:, None] == windows[None]).all(2)
    assert (match.sum(1) == 1).all()
    where = match.float().argmax(1)
    assert len(where.unique()) > 130 and 0.4 < (where >= 81).float().mean() < 0.6


@pytest.mark.parametrize(
    "aa", ["v0", "augmix-m3", "rand-m9-inc1-tweights", "rand-m9", "rand-mstd101-inc1"]
)
def test_what_is_made_one_by_one(aa: str) -> None:
    assert not can_batch(Augment(aa=aa)) and can_batch(Augment(aa="rand-m9-inc1"))
    assert not can_batch(Augment(color_jitter=0.4)) and can_batch(Augment())
