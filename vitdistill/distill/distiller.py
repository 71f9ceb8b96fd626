"""Distillation inside a training loop of your own: no recipe, no run folder."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import keyed
from ..data.augment import InputSpec
from ..data.batch import Batch
from ..data.model_input import input_spec_of
from ..errors import Add, ConfigError, DataError, Drop, Fix, Give, Set, UserError
from ..labels.identity import network_from_json
from ..labels.reader import LabelReader
from ..labels.store import LabelStore
from ..methods import METHODS, method_class, method_name
from ..methods.base import Masking, Objective, Scalar, TokenSelector
from ..vit.families import describe_network
from ..vit.output import ViTOutput
from ..vit.walk import run_vit
from ..weights.adopted import adopt
from ..weights.create import create_model
from .plan import Plan, make_plan
from .step import Distillation
from .teacher import Teacher

Answering = nn.Module | Callable[[Tensor], Any] | str | Path
"""What answers images with logits; or the folder of a run or an export, which holds such."""


@contextmanager
def _without_a_recipe() -> Iterator[None]:
    """Have errors name arguments and networks in place of a recipe's fields."""
    try:
        yield
    except UserError as error:
        error.fixes = tuple(map(_as_argument, error.fixes))
        raise


def _as_argument(fix: Fix) -> Fix:
    if isinstance(fix, Add):
        kind, name = method_class(fix.method.partition(":")[0]), repr(fix.method)
        if issubclass(kind, Objective):
            return f"add {name} to objectives"
        return f"give {'masking' if issubclass(kind, Masking) else 'selector'}={name}"
    if not isinstance(fix, Set):
        return fix
    part, _, field = fix.field.partition(".")
    who = f"the {part}"
    if part in ("teachers", "objectives"):
        name, _, field = field.partition(".")
        who = f"the {part[:-1]} {name!r}"
    if field == "model":
        return f"give {who}"
    verb = "build" if part in ("student", "teachers") else "make"
    field = field.removeprefix("model_args.").replace("image_size", "img_size")
    of = f"another {field}" if fix.value is None else f"{field}={fix.value!r}"
    return f"{verb} {who} with {of}"


class Distiller(nn.Module):
    """A student, its teachers and the losses between them, called on plain batches.

    ``distiller(images, labels)["loss"]`` is what to minimise, and ``distiller.parameters()`` what
    to train: the student's and those of the losses' adapters. Teachers are frozen and are no part
    of the module, so they are neither saved nor synchronised. Autocast, accumulation,
    ``DistributedDataParallel`` and ``torch.compile`` treat it as any other module
    (``docs/own_loop.md``). Networks that ``torch.compile`` wraps run compiled.

    Args:
        student: a timm network, any module that answers images with logits, or a run's folder.
        teachers: one, or several by name: as for ``student``, any function of images, or a
            `LabelStore` of stored answers. Each computes in its parameters' precision, a float32
            one under the loop's autocast.
        objectives: by name, or one or several methods: names (``"kd"``, or ``"kd:NAME"`` for the
            teacher of that name) or objects (``NKD(gamma=2)``).
        selector: chooses the patches that teachers see, such as ``"maskedkd"``.
        masking: hides patches from student and teachers, such as ``"random_masking"``.
        images_spec: size and normalisation of the batches; None: the student's own. A teacher that
            does not say what it was trained with is taken to want the same.
        seed: keys what is drawn at random for images that come with their ``ids``.

    Attributes:
        plan: what every network computes.

    Raises:
        ConfigError: these networks and methods do not go together; or, when it is called, labels
            or ids that they read are missing.
    """

    @_without_a_recipe()
    def __init__(
        self,
        student: nn.Module | str | Path,
        teachers: Answering | LabelStore | Mapping[str, Answering | LabelStore],
        objectives: Mapping[str, Objective] | Sequence[Objective | str] | Objective | str,
        selector: TokenSelector | str | None = None,
        masking: Masking | str | None = None,
        *,
        images_spec: InputSpec | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(teachers, Mapping):
            teachers = {"teacher": teachers}
        run, network = _unwrap(student, "student")
        spec = images_spec or input_spec_of(network)
        self.seed = seed
        self._readers = {
            name: LabelReader(name, store)
            for name, store in teachers.items()
            if isinstance(store, LabelStore)
        }
        self._teachers = {
            name: _freeze(model, name, spec)
            for name, model in teachers.items()
            if not isinstance(model, LabelStore)
        }
        networks = {name: teacher.network for name, teacher in self._teachers.items()}
        for name, reader in self._readers.items():
            about = reader.store.manifest.about
            networks[name] = network_from_json(about.get("network", {}), name)
        network = _adopted(network, "student", spec)
        plan = make_plan(
            describe_network(network, "student", _architecture(network), spec.image_size),
            networks,
            _named(objectives),
            None if selector is None else _made(selector, TokenSelector, "selector"),
            None if masking is None else _made(masking, Masking, "masking"),
            {name: reader.store.layout for name, reader in self._readers.items()},
        )
        self.distillation = Distillation(network, plan)
        self.distillation.run = run

    @property
    def plan(self) -> Plan:
        """What every network computes."""
        return self.distillation.plan

    @property
    def student(self) -> nn.Module:
        """The network that is trained."""
        return self.distillation.student

    def forward(
        self,
        images: Tensor | Batch,
        labels: Int[Tensor, " B"] | None = None,
        *,
        ids: Int[Tensor, " B"] | None = None,
        views: Int[Tensor, " B"] | None = None,
        mixed_labels: Int[Tensor, " B"] | None = None,
        lam: Float[Tensor, " B"] | None = None,
        progress: float = 0.0,
    ) -> dict[str, Scalar]:
        """Return the weighted loss of every objective by name, and their sum as ``loss``.

        ``NAME_unweighted`` is each without its weight.

        Args:
            images: (B, 3, h, w), normalised as ``images_spec`` says; or a batch of a `TrainLoader`.
            labels: of the images; None: unlabelled.
            ids: numbers of the samples. With them, what is drawn at random depends on seed, sample
                and view alone, and stored labels can be read; else torch draws.
            views: which view of each sample this is; None: the first.
            mixed_labels: the labels mixed in, as timm's mixup does.
            lam: the weight of ``labels`` against them.
            progress: the fraction of the training that is done, for schedules of weights.
        """
        batch = images
        if not isinstance(batch, Batch):
            if not isinstance(images, Tensor):
                what = f"the images are a {type(images).__name__}"
                raise ConfigError(what, "give a tensor (B, 3, h, w)", field="images")
            _check_images(images, self.student)
            if labels is not None:
                _check_labels(labels, len(images))
            reading = [name for name, o in self.plan.objectives.items() if o.reads_labels]
            if labels is None and reading:
                what = f"the objective {reading[0]!r} reads labels, and none are given"
                raise ConfigError(what, (Give("labels"), Drop(reading[0])), field="labels")
            none = torch.full((len(images),), -1, device=images.device)
            kind = _Drawn if ids is None else Batch
            batch = kind(
                images,
                none if labels is None else labels,
                none if ids is None else ids,
                none.clamp_min(0) if views is None else views,
                view=0,
                mixed_labels=mixed_labels,
                lam=lam,
                seed=self.seed,
            )
        for name, reader in self._readers.items():
            if isinstance(batch, _Drawn):
                what = f"the {name}'s stored labels are looked up by sample number"
                raise ConfigError(what, Give("ids"), field="ids")
            if name not in batch.targets:
                of_views, of_ids = (t.cpu().numpy() for t in (batch.views, batch.ids))
                batch.targets[name] = reader(of_views, of_ids, None, batch.images.device)
        for teacher in self._teachers.values():
            teacher.to(batch.images.device)
        return self.distillation(batch, self._teachers, progress)


@dataclass
class _Drawn(Batch):
    """A batch without sample ids, whose random numbers come from torch's generator."""

    def uniforms(
        self, count: int, stream: keyed.Stream = keyed.Stream.OBJECTIVE
    ) -> Float[Tensor, "B {count}"]:
        return torch.rand(len(self.images), count, device=self.images.device)


def _check_labels(labels: Any, count: int) -> None:
    """Raise `ConfigError` for labels that are not one class an image."""
    given = type(labels).__name__
    if isinstance(labels, Tensor):
        given = f"{labels.dtype}, {tuple(labels.shape)}"
        if labels.shape == (count,) and labels.dtype is torch.long:
            return
        if labels.ndim == 1 and len(labels) != count:
            what = f"{len(labels)} labels are given of {count} images"
            raise ConfigError(what, "give one an image", field="labels")
    what = f"the labels are {given}"
    fix = f"give class numbers from 0 on, torch.long, ({count},); of mixed images, mixed_labels too"
    raise ConfigError(what, fix, field="labels")


def _check_images(images: Tensor, student: nn.Module) -> None:
    """Raise `ConfigError` for a batch of another size or kind of numbers than the student's."""
    embed: Any = getattr(student, "patch_embed", None)
    fixed = tuple(embed.img_size) if getattr(embed, "strict_img_size", False) else ()
    dtype = next(student.parameters(), images).dtype
    cast = images.is_floating_point() and torch.is_autocast_enabled(images.device.type)
    fits = (
        images.ndim == 4
        and images.shape[1] == 3
        and images.shape[2:] == (fixed or images.shape[2:])
    )
    if fits and (cast or images.dtype == dtype):
        return
    sides = ", ".join(map(str, fixed or ("height", "width")))
    raise ConfigError(
        f"the student takes normalised images of {dtype}, (batch, 3, {sides}), and these are of"
        f" {images.dtype}, {tuple(images.shape)}",
        "convert, resize and normalise them, or build the student with their img_size",
        field="images",
    )


def _unwrap(model: Any, name: str) -> tuple[Callable[..., ViTOutput], Any]:
    """Return how to run a network, and the network, out of a folder or ``torch.compile``."""
    if isinstance(model, str | Path):
        found = [f for f in (Path(model, "best"), Path(model, "last"), Path(model)) if f.is_dir()]
        if not found:
            what = f"the {name} is {str(model)!r}, which is no folder of a run or an export"
            raise ConfigError(what, "give a network, as timm.create_model makes it", field=name)
        model = create_model(str(found[0]))
    if not (isinstance(model, nn.Module) or (callable(model) and name != "student")):
        what = f"the {name} is a {type(model).__name__}"
        several = ", or several teachers by name: {'first': ..., 'second': ...}"
        fix = "give a network, as timm.create_model makes it"
        raise ConfigError(what, fix if name == "student" else fix + several, field=name)
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        what = f"a network in {type(model).__name__} cannot be looked into"
        raise ConfigError(what, "give the network itself, and wrap the Distiller", field="student")
    inner: Any = getattr(model, "_orig_mod", None)
    # Its own forward is never called, so compile `run_vit` with the same options.
    return (run_vit, model) if inner is None else (model.dynamo_ctx(run_vit), inner)


def _architecture(model: nn.Module) -> str:
    known: Any = getattr(model, "pretrained_cfg", None) or {}
    return str(known.get("architecture") or type(model).__name__)


def _freeze(answering: Answering, name: str, images_spec: InputSpec) -> Teacher:
    run, model = _unwrap(answering, name)
    known = bool(getattr(model, "pretrained_cfg", None))
    model = _adopted(model, name, images_spec)
    spec = input_spec_of(model) if known else images_spec
    network = describe_network(model, name, _architecture(model), spec.image_size)
    weight = next(model.parameters(), torch.empty(0))
    own = None if weight.dtype is torch.float32 else weight.dtype
    teacher = Teacher(model, network, spec, images_spec, dtype=own, device=weight.device)
    teacher.run = run
    return teacher


def _adopted(model: Any, name: str, spec: InputSpec) -> nn.Module:
    """Return a network with ``num_classes``; one that says nothing of its input wants ``spec``."""
    if isinstance(model, nn.Module) and hasattr(model, "num_classes"):
        return model
    known = getattr(model, "pretrained_cfg", None)
    said = {} if known else {"mean": spec.mean, "std": spec.std}
    try:
        return adopt(model, f"the {name}", said, None if known else spec.image_size)
    except DataError as error:
        fixes = Give("images_spec"), "give a network of images (B, 3, h, w) to logits"
        raise ConfigError(error.what, fixes, field="images_spec") from error


def _made(method: Any, kind: type, argument: str) -> Any:
    """Return a method of this kind, which may be given by its name; refuse any other."""
    made = method
    if isinstance(method, str):
        name, _, teacher = method.partition(":")
        made = method_class(name)(**({"teacher": teacher} if teacher else {}))
    if not isinstance(made, kind):
        known = [name for name in METHODS if issubclass(method_class(name), kind)]
        what = f"{argument}: {getattr(method, '__name__', method)!r} is no {kind.__name__}"
        example = method_class(known[0]).__name__
        fix = f"give a name ({', '.join(known)}), or an object, vitdistill.methods.{example}()"
        raise ConfigError(what, fix, field=argument)
    return made


def _named(
    objectives: Mapping[str, Objective] | Sequence[Objective | str] | Objective | str,
) -> dict[str, Objective]:
    if isinstance(objectives, Mapping):
        return {name: _made(o, Objective, "objectives") for name, o in objectives.items()}
    named: dict[str, Objective] = {}
    several = [objectives] if isinstance(objectives, Objective | str) else objectives
    for made in (_made(method, Objective, "objectives") for method in several):
        key, teacher = method_name(made), getattr(made, "teacher", "teacher")
        key = key if teacher == "teacher" else f"{key}_{teacher}"
        if key in named:
            what = f"two objectives are called {key!r}"
            raise ConfigError(what, "give objectives by name, as a mapping", field="objectives")
        named[key] = made
    return named
