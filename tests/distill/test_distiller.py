"""`Distiller`: the product's own step, in anybody's loop."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_vits import ROTARY, batch_of, network, teacher_of, vit
from torch import Tensor, nn

from vitdistill import Distiller
from vitdistill.data.augment import InputSpec
from vitdistill.distill.plan import make_plan
from vitdistill.distill.step import Distillation
from vitdistill.errors import ConfigError
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import SoftKD
from vitdistill.methods.maskedkd import MaskedKD
from vitdistill.methods.masking import RandomMasking
from vitdistill.methods.nkd import NKD
from vitdistill.methods.vitkd import ViTKD

SPEC = InputSpec((16, 16), (0.5,) * 3, (0.5,) * 3)
CASES: dict[str, dict[str, Any]] = {
    "kd": {"objectives": {"ce": CrossEntropy(), "kd": SoftKD()}},
    "maskedkd": {"objectives": {"kd": SoftKD()}, "selector": MaskedKD(keep_rate=0.5)},
    "vitkd, nkd": {"objectives": {"vitkd": ViTKD(reduction="mean"), "nkd": NKD()}},
    "masking": {"objectives": {"kd": SoftKD()}, "masking": RandomMasking(mask_rate=0.5)},
}


class Own(nn.Module):
    """A network of somebody's own: it answers, and says nothing of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(), nn.Linear(64, 5))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def learn(module: nn.Module, losses_of: Any, steps: int = 3) -> list[Tensor]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    found = []
    for i in range(steps):
        losses = losses_of(batch_of(seed=i))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        found += [loss.detach() for loss in losses.values()]
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_losses_of_plain_tensors_are_those_of_the_products_step(case: str) -> None:
    student, teacher = vit(0).train(), vit(1, embed_dim=36, num_heads=3)
    torch.manual_seed(0)
    given = {"selector": None, "masking": None, **CASES[case]}
    plan = make_plan(network(student, "student"), {"teacher": network(teacher)}, **given)
    module = Distillation(copy.deepcopy(student), plan)
    own = teacher_of(copy.deepcopy(teacher))
    expected = learn(module, lambda batch: module(batch, {"teacher": own}))
    torch.manual_seed(0)
    distiller = Distiller(student, teacher, **given, images_spec=SPEC)

    def losses_of(batch: Any) -> Any:
        distiller.seed = batch.seed
        return distiller(batch.images, batch.labels, ids=batch.ids, views=batch.views)

    found = learn(distiller, losses_of)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(not p.requires_grad for p in teacher.parameters())
    names = {name for name, _ in distiller.named_parameters()}
    assert names and all(name.startswith("distillation.") for name in names)


def test_methods_may_be_named_and_torch_draws_for_images_without_numbers() -> None:
    distiller = Distiller(vit(0), vit(1), ["ce", "kd"], "random_patches", images_spec=SPEC)
    batch = batch_of()

    def loss(seed: int, **given: Any) -> float:
        torch.manual_seed(seed)
        losses = distiller(batch.images, batch.labels, **given)
        assert {"ce", "kd", "loss"} <= set(losses)
        return losses["loss"].item()

    assert loss(1) == loss(1) != loss(2)
    assert loss(1, ids=batch.ids) == loss(2, ids=batch.ids)


def test_a_batch_of_the_products_loader_will_do() -> None:
    distiller = Distiller(vit(0), vit(1), ["kd"], images_spec=SPEC)
    batch = batch_of()
    assert torch.equal(distiller(batch)["loss"], distiller(batch.images)["loss"])


def test_labels_that_were_mixed_in() -> None:
    distiller = Distiller(vit(0), vit(1), ["ce", "kd"], images_spec=SPEC)
    batch = replace(batch_of(), mixed_labels=batch_of().labels.flip(0), lam=torch.rand(3))
    names = ("labels", "mixed_labels", "lam")
    given = {name: getattr(batch, name) for name in names}
    assert torch.equal(distiller(batch)["loss"], distiller(batch.images, **given)["loss"])


@pytest.mark.parametrize("teacher", [Own(), vit(2, ROTARY)], ids=["a module", "rotary"])
@pytest.mark.parametrize("student", [Own(), vit(3)], ids=["a module", "a ViT"])
def test_networks_of_anybodys_own(student: nn.Module, teacher: nn.Module) -> None:
    distiller = Distiller(student.train(), teacher, ["ce", "kd"], images_spec=SPEC)
    assert distiller.plan.student.num_classes == distiller.plan.teachers["teacher"].num_classes == 5
    assert student.training and not teacher.training
    assert distiller(batch_of().images, batch_of().labels)["loss"].isfinite()


def test_a_teacher_has_its_own_normalisation_and_size() -> None:
    teacher = vit(1, img_size=32)
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, "mean": (0.1,) * 3, "std": (0.3,) * 3}
    distiller = Distiller(vit(0), teacher, {"kd": SoftKD()}, images_spec=SPEC)
    images = batch_of().images
    prepared = distiller._teachers["teacher"].prepare(images)
    pixels = nn.functional.interpolate(
        (images * 0.5 + 0.5 - 0.1) / 0.3, (32, 32), mode="bicubic", antialias=True
    )
    assert torch.allclose(prepared, pixels, atol=1e-5)


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        Distiller(Own(), vit(1), ["kd"], "maskedkd", images_spec=SPEC)
    assert refused.value.field
    with pytest.raises(ConfigError):
        Distiller(vit(0), vit(1), ["no_such"], images_spec=SPEC)
    distiller = Distiller(vit(0), vit(1), ["kd", "ce"], images_spec=SPEC)
    with pytest.raises(ConfigError) as refused:
        distiller(batch_of().images)
    assert refused.value.field == "labels"
