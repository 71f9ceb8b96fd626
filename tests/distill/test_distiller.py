"""`Distiller`: the product's own step, in anybody's loop."""

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from jaxtyping import TypeCheckError
from small_runs import plain_recipe, ranks, run, taught_recipe, write_images
from small_vits import ROTARY, batch_of, network, teacher_of, vit
from torch import Tensor, nn

import vitdistill.methods
from vitdistill import Distiller
from vitdistill.data.augment import Augment, InputSpec
from vitdistill.data.batch import Batch
from vitdistill.data.loader import Loading, TrainLoader
from vitdistill.data.sources.open import open_source
from vitdistill.distill.plan import make_plan
from vitdistill.distill.step import Distillation
from vitdistill.errors import ConfigError, DataError
from vitdistill.labels.reader import LabelReader
from vitdistill.methods import METHODS, method_class
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import SoftKD
from vitdistill.methods.maskedkd import MaskedKD
from vitdistill.methods.masking import RandomMasking
from vitdistill.methods.nkd import NKD
from vitdistill.methods.vitkd import ViTKD
from vitdistill.recipes.convert import replace_fields
from vitdistill.runs.label import LabelOptions, label
from vitdistill.runs.prepare import prepare
from vitdistill.weights.export import export_timm
from vitdistill.world import ALONE

SPEC = InputSpec((16, 16), (0.5,) * 3, (0.5,) * 3)
CASES: dict[str, dict[str, Any]] = {
    "kd": {"objectives": {"ce": CrossEntropy(), "kd": SoftKD()}},
    "maskedkd": {"objectives": {"kd": SoftKD()}, "selector": MaskedKD(keep_rate=0.5)},
    "vitkd, nkd": {"objectives": {"vitkd": ViTKD(reduction="mean"), "nkd": NKD()}},
    "masking": {"objectives": {"kd": SoftKD()}, "masking": RandomMasking(mask_rate=0.5)},
}


NO_BATCH: dict[str, Callable[[Tensor], Tensor]] = {
    "enlarged": lambda x: nn.functional.interpolate(x, (32, 32)),
    "oblong": lambda x: x[..., :8],
    "bytes": lambda x: (x * 255).to(torch.uint8),
    "doubles": torch.Tensor.double,
    "channels last": lambda x: x.permute(0, 2, 3, 1),
    "one image": lambda x: x[0],
    "grey": lambda x: x[:, :1],
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


def test_a_folder_of_a_run_or_an_export_stands_for_its_network(tmp_path: Path) -> None:
    """A run's best weights, where it has any."""
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    for seed, kind in enumerate(("best", "last")):
        model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **shape)
        nn.init.constant_(model.head.bias, seed)
        how = {"architecture": "vit_tiny_patch16_224", "model_args": {**shape, "num_classes": 5}}
        export_timm(model, tmp_path / kind, input_spec=SPEC, classes=None, **how)
    batch = batch_of()
    for folder, bias in ((tmp_path, 0), (str(tmp_path / "last"), 1)):
        distiller = Distiller(folder, folder, ["ce", "kd"])
        assert set(distiller.student.head.bias.tolist()) == {bias}
        assert float(distiller.eval()(batch.images, batch.labels)["kd"].detach()) < 1e-6
    with pytest.raises(ConfigError, match="'vit_tiny_patch16_224', which is no folder"):
        Distiller(vit(0), "vit_tiny_patch16_224", ["kd"])


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


def test_a_teacher_is_asked_in_evaluation_mode_whatever_was_done_to_it() -> None:
    teacher = timm.create_model("resnet10t", num_classes=5)
    distiller = Distiller(vit(0), teacher, ["ce", "kd"], images_spec=SPEC)
    images, labels = torch.rand(4, 3, 16, 16), torch.arange(4) % 3
    first = distiller(images, labels)["kd"]
    teacher.train()
    assert torch.equal(distiller(images, labels)["kd"], first) and not teacher.training


@pytest.mark.parametrize(
    "labels",
    [[0, 1, 2, 0], torch.rand(4), torch.eye(4), torch.arange(4).int(), torch.zeros(3).long()],
)
def test_labels_are_one_class_an_image(labels: Any) -> None:
    distiller = Distiller(vit(0), vit(1), ["ce", "kd"], images_spec=SPEC)
    with pytest.raises((ConfigError, TypeCheckError), match="labels"):
        distiller(torch.rand(4, 3, 16, 16), labels)


def test_the_class_of_every_method_is_imported_by_its_name() -> None:
    for name in METHODS:
        cls = method_class(name)
        assert getattr(vitdistill.methods, cls.__name__) is cls
    with pytest.raises(ImportError):
        from vitdistill.methods import Nobody  # noqa: F401


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        Distiller(Own(), vit(1), ["kd"], "maskedkd", images_spec=SPEC)
    assert refused.value.field
    with pytest.raises(ConfigError):
        Distiller(vit(0), vit(1), ["no_such"], images_spec=SPEC)
    for change in NO_BATCH.values():
        with pytest.raises(ConfigError, match=r"takes normalised .*, and these are") as refused:
            Distiller(vit(0), vit(1), ["kd"])(change(batch_of().images))
        assert refused.value.field == "images"
    other = InputSpec((32, 32), SPEC.mean, SPEC.std)
    with pytest.raises(ConfigError, match=r"\(batch, 3, 16, 16\)"):
        Distiller(vit(0), vit(1), ["kd"], images_spec=other)(torch.rand(2, 3, 32, 32))
    any_size = vit(0, dynamic_img_size=True)
    assert Distiller(any_size, vit(1), ["kd"])(torch.rand(2, 3, 32, 32))["loss"].isfinite()
    distiller = Distiller(vit(0), vit(1), ["kd", "ce"], images_spec=SPEC)
    with pytest.raises(ConfigError) as refused:
        distiller(batch_of().images)
    assert refused.value.field == "labels"


def test_errors_name_arguments_and_networks_and_no_field_of_a_recipe() -> None:
    ce, whole = ["ce", "kd"], {"masking": "random_masking"}
    cases: list[tuple[Any, str]] = [
        (lambda: Distiller(vit(0), {}, ce), "give the teacher 'teacher'"),
        (lambda: Distiller(vit(0), [vit(1)], ce), "several teachers by name"),
        (lambda: Distiller(vit(0), vit(1), ["ce", SoftKD]), "'SoftKD' is no Objective"),
        (lambda: Distiller(vit(0), vit(1), ["maskedkd"]), "'maskedkd' is no Objective"),
        (lambda: Distiller(vit(0), vit(1), ce, "random_masking"), "is no TokenSelector"),
        (lambda: Distiller(vit(0), vit(1), ["mae"]), "give masking='random_masking'"),
        (lambda: Distiller(vit(0), vit(1, img_size=32), ce, **whole), "student with img_size=32"),
        (lambda: Distiller(vit(0), vit(1), "kd")([1]), "give a tensor"),
        (
            lambda: Distiller(vit(0), vit(1), ce)(batch_of().images, torch.zeros(1).long()),
            "1 labels are given",
        ),
    ]
    for make, words in cases:
        # Where shapes are checked, so are types, and before us.
        with pytest.raises((ConfigError, TypeCheckError)) as refused:
            make()
        if isinstance(refused.value, ConfigError):
            said = str(refused.value)
            assert words in said and "student." not in said and "set " not in said


# -- anybody's loop -------------------------------------------------------------------------------


def adapted(**given: Any) -> Distiller:
    """One whose losses have adapters, and a selector."""
    torch.manual_seed(0)
    teacher = vit(1, embed_dim=36, num_heads=3)
    methods = ["ce", "kd", ViTKD(reduction="mean"), NKD()]
    return Distiller(vit(0), teacher, methods, "maskedkd", images_spec=SPEC, **given).train()


def gradients(distiller: nn.Module, loss: Callable[[], Tensor]) -> list[Tensor]:
    distiller.zero_grad()
    loss().backward()
    found = [parameter.grad for parameter in distiller.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in found)
    return [grad.clone() for grad in found if grad is not None]


def numbered(batch: Batch, part: int) -> dict[str, Tensor]:
    """Every second sample of a batch, as it is given to a Distiller."""
    return {name: getattr(batch, name)[part::2] for name in ("images", "labels", "ids")}


def close(ours: list[Tensor], theirs: list[Tensor], rel: float) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all((a - b).norm() <= rel * b.norm() + 1e-7 for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_and_with_scaled_losses(dtype: torch.dtype) -> None:
    distiller, batch = adapted(), batch_of(4)
    exact = gradients(distiller, lambda: distiller(batch)["loss"])
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0, enabled=dtype is torch.float16)

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype):
            losses = distiller(batch)
        assert all(value.dtype is torch.float32 for value in losses.values())
        return scaler.scale(losses["loss"])

    found = [grad / scaler.get_scale() for grad in gradients(distiller, loss)]
    assert close(found, exact, 0.5) and not close(found, exact, 1e-6)


def test_networks_of_another_precision() -> None:
    expected, batch = adapted()(batch_of(4)), batch_of(4)
    distiller = adapted().bfloat16()
    distiller._teachers["teacher"].model.to(torch.float32)
    found = distiller(batch.images.bfloat16(), batch.labels)
    found["loss"].backward()
    assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=0.05)
    half = Distiller(vit(0), vit(1).bfloat16(), ["kd"], images_spec=SPEC)
    assert half(batch.images)["loss"].isfinite()


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    distiller, batch = adapted(), batch_of(4)
    whole = gradients(distiller, lambda: distiller(batch)["loss"])
    parts = [numbered(batch, i) for i in range(2)]
    both = gradients(distiller, lambda: sum(distiller(**part)["loss"] / 2 for part in parts))
    assert close(both, whole, 1e-5)


@pytest.mark.whole
def test_two_processes_have_the_gradients_of_one() -> None:
    batch = batch_of(4)

    def work(rank: int) -> list[Any]:
        dist.init_process_group("gloo")
        distiller = adapted()
        module = nn.parallel.DistributedDataParallel(distiller)
        found = gradients(distiller, lambda: module(**numbered(batch, rank))["loss"])
        dist.destroy_process_group()
        return [grad.numpy() for grad in found]

    distiller = adapted()
    one = gradients(distiller, lambda: distiller(batch)["loss"])
    for found in ranks(2, work):
        assert close([torch.from_numpy(grad) for grad in found], one, 1e-5)


@pytest.mark.whole
def test_what_is_compiled_runs_compiled_and_computes_the_same() -> None:
    graphs: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    def compiled(module: nn.Module) -> Any:
        return torch.compile(module, backend=backend)

    batch = batch_of()
    student, teacher = vit(0), vit(1)
    plain = Distiller(student, teacher, ["ce", "kd"], "maskedkd", images_spec=SPEC)
    expected = plain(batch.images, batch.labels)["loss"]
    for ours, theirs in ((compiled(student), teacher), (student, compiled(teacher))):
        graphs.clear()
        distiller = Distiller(ours, theirs, ["ce", "kd"], "maskedkd", images_spec=SPEC)
        assert torch.allclose(distiller(batch.images, batch.labels)["loss"], expected)
        assert graphs and distiller.student is student
    graphs.clear()
    losses = compiled(plain)(batch.images, batch.labels)
    losses["loss"].backward()
    assert graphs and torch.allclose(losses["loss"], expected)


def test_teachers_by_name_and_functions_that_answer() -> None:
    first, second, batch = vit(1), vit(2), batch_of()
    teachers = {"a": first, "b": lambda images: second(images)}
    distiller = Distiller(vit(0), teachers, ["kd:a", SoftKD(teacher="b")], images_spec=SPEC)
    losses = distiller(batch.images)
    for key, teacher in {"kd_a": first, "kd_b": second}.items():
        alone = Distiller(vit(0), teacher, ["kd"], images_spec=SPEC)
        assert torch.allclose(losses[key], alone(batch.images)["kd"])
    with pytest.raises(ConfigError) as refused:
        Distiller(vit(0), first, ["kd", SoftKD(weight=2.0)], images_spec=SPEC)
    assert refused.value.field == "objectives"


def test_what_is_saved_is_the_student_and_the_adapters() -> None:
    distiller, other, batch = adapted(), adapted(), batch_of()
    learn(distiller, lambda batch: distiller(batch))
    other.load_state_dict(distiller.state_dict())
    assert torch.equal(other(batch)["loss"], distiller(batch)["loss"])
    parts = {name.split(".")[1] for name in distiller.state_dict()}
    assert parts == {"student", "adapters"}


def test_networks_that_cannot_be_looked_into() -> None:
    with pytest.raises(ConfigError):
        Distiller(nn.DataParallel(vit(0)), vit(1), ["kd"], images_spec=SPEC)
    with pytest.raises(ConfigError) as refused:
        Distiller(Own(), vit(1), ["kd"])  # of 16 x 16 images, which nobody says
    assert refused.value.field == "images_spec"


@pytest.mark.whole
def test_labels_that_were_stored(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    run(plain_recipe(images), tmp_path / "teacher")
    recipe = replace_fields(
        taught_recipe(images, tmp_path / "teacher", **{"train.accumulate": 1}), {"selector": None}
    )
    options = LabelOptions(encoding="float32")
    (store,) = label(recipe, tmp_path / "labels", options, device="cpu").stores.values()
    labels = {"teachers.teacher.labels": str(store.path)}
    prepared = prepare(replace_fields(recipe, labels), ALONE, lambda _: None)
    distiller = Distiller(
        copy.deepcopy(prepared.student), store, recipe.objectives, images_spec=SPEC
    ).eval()
    prepared.distillation.eval()
    for (batch,) in prepared.loaders.train.batches(2, 2):
        expected = prepared.distillation(batch, {})
        names = ("labels", "ids", "views", "mixed_labels", "lam")
        given = {name: getattr(batch, name) for name in names}
        for found in (
            distiller(batch.images, **given),
            distiller(batch),
            distiller(replace(batch, targets={})),
        ):
            assert {k: v.item() for k, v in found.items()} == {
                k: v.item() for k, v in expected.items()
            }
    with pytest.raises(ConfigError) as refused:
        distiller(batch.images, batch.labels)
    assert refused.value.field == "ids"
    assert store.augment == recipe.data.augment != Augment()
    reader, loading = {"teacher": LabelReader("teacher", store)}, Loading(batch_size=4, seed=0)
    loader = TrainLoader(open_source(str(images), "train"), Augment(), SPEC, loading, reader)
    made = ", ".join(
        f"{key}={value!r}"
        for key, value in vars(recipe.data.augment).items()
        if value != getattr(Augment, key)
    )
    with pytest.raises(
        DataError, match=re.escape(f"Augment({made}), seed {recipe.data_seed}, 16 ")
    ):
        next(loader.batches(0, 1))
