"""Distillation inside a training loop of your own: no recipe, no run folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import keyed
from ..data.augment import InputSpec
from ..data.batch import Batch
from ..data.model_input import input_spec_of
from ..errors import ConfigError, Drop, Give
from ..labels.identity import network_from_json
from ..labels.reader import LabelReader
from ..labels.store import LabelStore
from ..methods import method_class, method_name
from ..methods.base import Masking, Objective, Scalar, TokenSelector
from ..vit.families import describe_network
from ..vit.network import Network
from .plan import Plan, make_plan
from .step import Distillation
from .teacher import Teacher


class Distiller(nn.Module):
    """A student, its teachers and the losses between them, called on plain batches.

    ``distiller(images, labels)["loss"]`` is what to minimise, and ``distiller.parameters()`` what
    to train: the student's and those of the losses' adapters. Teachers are frozen and are no part
    of the module, so they are neither saved nor synchronised. Autocast, accumulation,
    ``DistributedDataParallel`` and ``torch.compile`` treat it as any other module.

    Args:
        student: a timm network, or any module that answers images with logits.
        teachers: likewise, one or several by name; or a `LabelStore` of stored answers.
        objectives: by name, or a list of methods: names (``"kd"``) or objects (``NKD(gamma=2)``).
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

    def __init__(
        self,
        student: nn.Module,
        teachers: nn.Module | LabelStore | Mapping[str, nn.Module | LabelStore],
        objectives: Mapping[str, Objective] | Sequence[Objective | str],
        selector: TokenSelector | str | None = None,
        masking: Masking | str | None = None,
        *,
        images_spec: InputSpec | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(teachers, Mapping):
            teachers = {"teacher": teachers}
        spec = images_spec or input_spec_of(student)
        self.seed = seed
        self._readers = {
            name: LabelReader(name, store)
            for name, store in teachers.items()
            if isinstance(store, LabelStore)
        }
        self._teachers = {
            name: _freeze(model, name, spec)
            for name, model in teachers.items()
            if isinstance(model, nn.Module)
        }
        networks = {name: teacher.network for name, teacher in self._teachers.items()}
        for name, reader in self._readers.items():
            about = reader.store.manifest.about
            networks[name] = network_from_json(about.get("network", {}), name)
        plan = make_plan(
            _describe(student, "student", spec.image_size),
            networks,
            _named(objectives),
            _made(selector),
            _made(masking),
            {name: reader.store.layout for name, reader in self._readers.items()},
        )
        self.distillation = Distillation(student, plan)

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
        images: Float[Tensor, "B 3 h w"] | Batch,
        labels: Int[Tensor, " B"] | None = None,
        *,
        ids: Int[Tensor, " B"] | None = None,
        views: Int[Tensor, " B"] | None = None,
        mixed_labels: Int[Tensor, " B"] | None = None,
        lam: Float[Tensor, " B"] | None = None,
        progress: float = 0.0,
    ) -> dict[str, Scalar]:
        """Return the weighted loss of every objective by name, and their sum as ``loss``.

        ``NAME_unweighted`` is each before its weight.

        Args:
            images: normalised as ``images_spec`` says; or a batch of a `TrainLoader`.
            labels: of the images; None: unlabelled.
            ids: numbers of the samples. With them, what is drawn at random depends on seed, sample
                and view alone, and stored labels can be read; else torch draws.
            views: which view of each sample this is; None: the first.
            mixed_labels, lam: the labels mixed in, and the weight of ``labels`` against them.
            progress: the fraction of the training that is done, for schedules of weights.
        """
        batch = images
        if not isinstance(batch, Batch):
            assert isinstance(images, Tensor)
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
                if ids is None:
                    what = f"the {name}'s stored labels are read by the samples' numbers"
                    raise ConfigError(what, Give("ids"), field="ids")
                of_views, of_ids = (t.cpu().numpy() for t in (batch.views, batch.ids))
                batch.targets[name] = reader(of_views, of_ids, None, images.device)
        for teacher in self._teachers.values():
            teacher.to(batch.images.device)
        return self.distillation(batch, self._teachers, progress)


@dataclass
class _Drawn(Batch):
    """A batch of images that nobody numbered: torch's generator draws for them."""

    def uniforms(
        self, count: int, stream: keyed.Stream = keyed.Stream.OBJECTIVE
    ) -> Float[Tensor, "B {count}"]:
        return torch.rand(len(self.images), count, device=self.images.device)


def _describe(model: nn.Module, name: str, image_size: tuple[int, int]) -> Network:
    network = describe_network(model, name, _architecture(model), image_size)
    if network.walks or hasattr(model, "num_classes"):
        return network
    # A module of the user's own says how many classes it knows by answering.
    training, place = model.training, next(model.parameters(), torch.empty(0)).device
    with torch.no_grad():
        answer = model.eval()(torch.zeros(1, 3, *image_size, device=place))
    model.train(training)
    return replace(network, num_classes=answer.shape[-1])


def _architecture(model: nn.Module) -> str:
    known: Any = getattr(model, "pretrained_cfg", None) or {}
    return str(known.get("architecture") or type(model).__name__)


def _freeze(model: nn.Module, name: str, images_spec: InputSpec) -> Teacher:
    known = bool(getattr(model, "pretrained_cfg", None))
    spec = input_spec_of(model) if known else images_spec
    network = _describe(model, name, spec.image_size)
    device = next(model.parameters(), torch.empty(0)).device
    return Teacher(model, network, spec, images_spec, device=device)


def _made(method: Any) -> Any:
    return method_class(method)() if isinstance(method, str) else method


def _named(
    objectives: Mapping[str, Objective] | Sequence[Objective | str],
) -> dict[str, Objective]:
    if isinstance(objectives, Mapping):
        return dict(objectives)
    made = [_made(objective) for objective in objectives]
    return {method_name(objective): objective for objective in made}
