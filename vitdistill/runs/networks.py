"""From a recipe to networks: the student, the teachers, their input contracts, and the plan that
ties them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.models import is_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.overrides import TorchFunctionMode

from ..data.augment import InputSpec
from ..data.model_input import input_spec_of
from ..distill.classes import ClassMatch, match_classes
from ..distill.plan import Plan, make_plan
from ..distill.teacher import Teacher, setting
from ..errors import ConfigError
from ..labels.identity import network_from_json
from ..labels.store import LabelStore
from ..methods.base import Objective, TeacherObjective
from ..models.mae import hold_positions, init_mae
from ..recipes.config import Recipe, StudentConfig, TeacherConfig
from ..vit.families import describe_network
from ..vit.network import Network
from ..weights import create as weights


@dataclass(frozen=True)
class Built:
    """A model with its input contract and its description."""

    model: nn.Module
    spec: InputSpec
    network: Network


class _StepsOnCPU(TorchFunctionMode):
    """timm 1.0.20 reads the numbers of a ``torch.linspace`` while it builds a network, and on the
    meta device there are none.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


@contextmanager
def without_memory() -> Iterator[None]:
    """Networks that are built inside are on the meta device: they have shapes and no numbers."""
    with torch.device("meta"), _StepsOnCPU():
        yield


_PLACES: ContextVar[Mapping[str, str]] = ContextVar("_PLACES")


@contextmanager
def runs_at(places: Mapping[str, str]) -> Iterator[None]:
    """Inside, runs are looked for in these folders, by what recipes call them: of a recipe that is
    kept as it was, they may have moved.
    """
    token = _PLACES.set(places)
    try:
        yield
    finally:
        _PLACES.reset(token)


def resolve_run(name: str) -> str:
    """A run folder stands for its best weights, or its last where there was nothing to choose by;
    other names for themselves.

    A folder of stages stands for the run of its last one.
    """
    name = _PLACES.get({}).get(name, name)
    path = Path(name)
    if (path / "stages.yaml").is_file():
        from .stages import last_run

        path = last_run(path)
        name = str(path)
    if not (path / "recipe.yaml").is_file():
        return name
    for kind in ("best", "last"):
        if (path / kind / "config.json").is_file():
            return str(path / kind)
    raise ConfigError(
        f"the run {name} has no weights yet: it was stopped before its first evaluation"
    )


def _create(
    config: StudentConfig | TeacherConfig,
    name: str,
    num_classes: int | None,
    load: bool,
    **extra: Any,
) -> Built:
    if not config.model:
        flag = "--model" if isinstance(config, StudentConfig) else setting(name, "model", "MODEL")
        raise ConfigError(
            f"the {name} has no model: name one with {flag} (a timm name, hf-hub:org/name, or the"
            " folder of a run)"
        )
    try:
        model = weights.create_model(
            resolve_run(config.model),
            num_classes=num_classes,
            checkpoint=config.checkpoint if load else None,
            pretrained=(config.pretrained or None) if load else False,
            image_size=config.image_size,
            **extra,
            **config.model_args,
        )
    except (TypeError, AssertionError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"the {name} {config.model} cannot be built with model_args {config.model_args}:"
            f" {first}"
        ) from error
    spec = input_spec_of(model)
    if config.image_size is not None:
        spec = replace(spec, image_size=(config.image_size, config.image_size))
    return Built(model, spec, describe_network(model, name, config.model, spec.image_size))


def build_student(config: StudentConfig, num_classes: int, *, with_weights: bool = True) -> Built:
    """The student with a head for ``num_classes``; raises `ConfigError` or `DataError` with one
    sentence.
    """
    built = _create(
        config, "student", num_classes, with_weights, drop_path=config.drop_path or None
    )
    if config.init == "mae":
        if not isinstance(built.model, VisionTransformer):
            raise ConfigError(
                f"student.init is mae, which is for plain ViTs, and {config.model} is none: leave"
                " it out, or take another"
            )
        if (
            config.checkpoint
            or config.pretrained
            or weights.carries_weights(resolve_run(config.model))
        ):
            hold_positions(built.model)
        else:
            init_mae(built.model)
    return built


def build_teacher_model(config: TeacherConfig, name: str, *, with_weights: bool = True) -> Built:
    """A teacher's network with its own head; raises `ConfigError` when no weights are named for it,
    unless they are not wanted.
    """
    if with_weights:
        check_has_weights(config, name)
    return _create(config, name, None, with_weights)


def check_has_weights(config: TeacherConfig, name: str) -> None:
    """Raise `ConfigError` for a teacher that no weights are named for, and `DataError` where the
    file that is named is not there.
    """
    if config.checkpoint:
        weights.check_is_file(config.checkpoint)
    known = is_model(
        config.model.partition(".")[0]
    )  # of a name that does not exist something else is said
    if (
        known
        and not config.checkpoint
        and not config.pretrained
        and not weights.carries_weights(resolve_run(config.model))
    ):
        flags = f"{setting(name, 'checkpoint', 'FILE')}, {setting(name, 'pretrained')}"
        raise ConfigError(
            f"the {name} {config.model} would have random weights: give {flags}, or the folder of a"
            " run in its place"
        )


def trains_classifier(objectives: Mapping[str, Objective], student: Network) -> bool:
    """Whether any objective reaches a classifier of the student; if not, it is built without
    one.
    """
    return any(objective.trains_heads(student) for objective in objectives.values())


def reads_logits(objectives: Mapping[str, Objective], teacher: Network) -> bool:
    """Whether any objective compares with the prediction of this teacher."""
    readers = (
        o
        for o in objectives.values()
        if isinstance(o, TeacherObjective) and o.teacher == teacher.name
    )
    return any(objective.teacher_needs(teacher).logits for objective in readers)


def blank_teacher(config: TeacherConfig, name: str, objectives: Mapping[str, Objective]) -> Built:
    """A teacher's network without weights, as far as it can be known without them.

    Whether it has a classifier is its file's to say: where no objective reads logits, one with a
    file is taken to have none.
    """
    built = build_teacher_model(config, name, with_weights=False)
    if (
        config.checkpoint
        and not reads_logits(objectives, built.network)
        and hasattr(built.model, "reset_classifier")
    ):
        built.model.reset_classifier(0)  # type: ignore[operator]
        built = replace(
            built, network=describe_network(built.model, name, config.model, built.spec.image_size)
        )
    return built


def build_teacher(
    config: TeacherConfig,
    name: str,
    classes: tuple[str, ...],
    images_spec: InputSpec,
    device: torch.device | str,
    objectives: Mapping[str, Objective] | None = None,
    built: Built | None = None,
) -> tuple[Teacher, ClassMatch]:
    """A frozen teacher that answers for ``classes`` in their order (empty: its own, for unlabelled
    images).

    A teacher of whom no objective reads the logits may have any classes, or none; ``objectives``
    None: they are read. ``built`` is its network if that is there already.
    """
    built = build_teacher_model(config, name) if built is None else built
    names = weights.class_names(built.model)
    match = ClassMatch(None, "the images are unlabelled: its own classes are kept", names or ())
    if objectives is not None and not reads_logits(objectives, built.network):
        match = ClassMatch(None, "only its features are read")
    elif classes:
        match = match_classes(
            name, names, built.network.num_classes, classes, config.reorder_classes
        )
    network = (
        built.network
        if match.index is None
        else replace(built.network, num_classes=len(match.index))
    )
    index = None if match.index is None else torch.tensor(match.index)
    dtype = {"same": None, "float32": torch.float32, "bfloat16": torch.bfloat16}[config.precision]
    teacher = Teacher(
        built.model, network, built.spec, images_spec, class_index=index, dtype=dtype, device=device
    )
    return teacher, match


def open_labels(recipe: Recipe) -> dict[str, LabelStore]:
    """The label stores of the teachers that have one, by the teacher's name; raises `DataError` for
    what is no store.
    """
    return {
        name: LabelStore.open(config.labels)
        for name, config in recipe.teachers.items()
        if config.labels is not None
    }


def stored_network(store: LabelStore, name: str) -> Network:
    """The description of the teacher behind stored labels, under the name it has in this run."""
    return network_from_json(store.manifest.about.get("network", {}), name)


def with_views_of_labels(recipe: Recipe, began: Recipe | None = None) -> Recipe:
    """The recipe with the views of its labels, their number and their seed, where it does not say
    which.

    Of labels of several teachers it has as many views as all of those that may not lack any. A run
    that ``began`` goes on with the views it had, whatever has been labelled since.

    Raises:
        ConfigError: it wants more views than are labelled.
    """
    stores = open_labels(recipe)
    if not stores:
        return recipe
    data, needed = (
        recipe.data,
        {name: store for name, store in stores.items() if recipe.teachers[name].missing == "error"},
    )
    fewest = min(store.manifest.num_views for store in (needed or stores).values())
    if began is not None:
        views, seed = began.data.views, began.data.seed
    else:
        views = fewest if fewest < recipe.train.epochs else None
        seeds = (store.manifest.identity.get("view.seed") for store in stores.values())
        seed = next(
            (seed for seed in seeds if isinstance(seed, int) and seed != recipe.train.seed), None
        )
    data = replace(
        data,
        views=views if data.views is None else data.views,
        seed=seed if data.seed is None else data.seed,
    )
    for name, store in needed.items():
        if data.views is not None and data.views > store.manifest.num_views:
            raise ConfigError(
                f"the recipe shows {data.views} views of each image (data.views), and the labels of"
                f" the {name} are of {store.manifest.num_views}: set --views {fewest}, or label"
                " more"
            )
    return replace(recipe, data=data)


def plan_of(recipe: Recipe, student: Network, teachers: Mapping[str, Network]) -> Plan:
    """The plan of a recipe for these networks; teachers whose answers are stored are described by
    their labels.
    """
    stores = open_labels(recipe)
    known = {
        name: stored_network(stores[name], name) if name in stores else teachers[name]
        for name in recipe.teachers
    }
    layouts = {name: store.layout for name, store in stores.items()}
    return make_plan(student, known, recipe.objectives, recipe.selector, recipe.masking, layouts)


def prefer_explicit_attention(model: nn.Module) -> None:
    """Let timm's blocks compute attention explicitly: on CPUs in bfloat16 the fused kernel is
    slower (0.6-0.75 of its time).
    """
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", False)  # noqa: B010  (a plain attribute, which mypy takes for a submodule)
