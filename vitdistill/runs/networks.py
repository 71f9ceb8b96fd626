"""From a recipe to networks: the student, its teachers, and the plan that ties them."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from types import FunctionType
from typing import Any

import torch
from torch import nn

from ..data.augment import InputSpec, evaluated_as_trained
from ..data.model_input import input_spec_of
from ..distill.classes import ClassMatch, match_classes
from ..distill.plan import Plan, make_plan
from ..distill.step import Distillation
from ..distill.teacher import Teacher
from ..errors import ConfigError, Say, Set, UserError, fields_below
from ..messages import first_line
from ..methods.base import Objective, TeacherObjective
from ..models.mae import hold_positions, init_mae
from ..recipes.config import Recipe, StudentConfig, TeacherConfig
from ..vit.families import describe_network
from ..vit.network import Network
from ..weights import create as weights
from ..weights.files import check_is_file, is_weights
from ..weights.outside import is_outside
from .identity import is_unfinished, resolve_run
from .orders import natural_order
from .stored import made_by, open_labels, stored_network

PRECISIONS = {"same": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
"""The dtype of a teacher by ``TeacherConfig.precision``; None: autocast as the student."""


@dataclass(frozen=True)
class Built:
    """A model with its input contract and its description."""

    model: nn.Module
    spec: InputSpec
    network: Network


def amp_dtype_of(name: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast precision of a run; None: none."""
    if name == "auto":
        # A GPU without bfloat16 of its own (T4, V100) emulates it, slower than float32.
        on_gpu = device.type == "cuda"
        native = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else None
    return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def name_precision(dtype: torch.dtype | None) -> str:
    """Return what `amp_dtype_of` calls a precision."""
    return "float32" if dtype is None else str(dtype).removeprefix("torch.")


def build_student(config: StudentConfig, num_classes: int, *, with_weights: bool = True) -> Built:
    """Build the student with a head for ``num_classes``; 0: without a head."""
    drop_path = config.drop_path or None
    built = _build(config, "student", num_classes, with_weights, drop_path=drop_path)
    if config.init == "mae":
        if not built.network.walks:
            what = f"init mae is for plain ViTs, and {config.model} is none"
            raise ConfigError(what, (Set("student.init", "model"), Set("student.model")))
        begin = hold_positions if _has_weights(config) else init_mae
        begin(built.model)
    return built


def build_teacher_model(config: TeacherConfig, name: str, *, with_weights: bool = True) -> Built:
    """Build a teacher's network with its own head; weights are required unless unwanted."""
    if with_weights:
        check_has_weights(config, name)
    return _build(config, name, None, with_weights)


def _build(
    config: StudentConfig | TeacherConfig,
    name: str,
    num_classes: int | None,
    with_weights: bool,
    **extra: Any,
) -> Built:
    field = "student" if isinstance(config, StudentConfig) else f"teachers.{name}"
    if not config.model:
        raise ConfigError(f"no {name} is given", Set(f"{field}.model"))
    if is_weights(config.model):
        what = f"{config.model} is a file of weights, not the name of a network"
        raise ConfigError(what, Set(f"{field}.checkpoint", config.model), field=f"{field}.model")
    with fields_below(field, {own.name for own in fields(config)}):
        model = weights.create_model(
            resolve_run(config.model),
            num_classes=num_classes,
            checkpoint=config.checkpoint if with_weights else None,
            pretrained=(config.pretrained or None) if with_weights else False,
            image_size=config.image_size,
            **extra,
            **config.model_args,
        )
    spec = input_spec_of(model)
    if config.image_size is not None:
        spec = replace(spec, image_size=(config.image_size, config.image_size))
    network = describe_network(model, name, config.model, spec.image_size)
    if not (network.walks or is_outside(config.model)):
        # Makes depthwise convolutions up to 1.5 times as fast, forward and backward.
        model = model.to(memory_format=torch.channels_last)
    return Built(model, spec, network)


def _has_weights(config: StudentConfig | TeacherConfig) -> bool:
    """Return whether weights are named, by a file or by the model itself."""
    return bool(config.checkpoint) or _loads_own_weights(config)


def _loads_own_weights(config: StudentConfig | TeacherConfig) -> bool:
    """Return whether weights come with the model itself."""
    return config.pretrained or weights.carries_weights(resolve_run(config.model))


def check_has_weights(config: TeacherConfig, name: str) -> None:
    """Raise `ConfigError` for a teacher without weights, `DataError` where their file is absent."""
    if config.checkpoint:
        check_is_file(config.checkpoint)
    if not _has_weights(config):
        field = f"teachers.{name}"
        file, pretrained = Set(f"{field}.checkpoint", "FILE"), Set(f"{field}.pretrained", True)
        what = f"the {name} {config.model} would have random weights"
        raise ConfigError(what, (file, pretrained, Set(f"{field}.model", "RUN")))


def find_logit_readers(
    objectives: Mapping[str, Objective], teacher: Network
) -> list[TeacherObjective]:
    return [
        objective
        for objective in objectives.values()
        if isinstance(objective, TeacherObjective)
        and objective.teacher == teacher.name
        and objective.teacher_needs(teacher).logits
    ]


def build_blank(
    recipe: Recipe, num_classes: int, heads: Mapping[str, int] | None = None
) -> tuple[Built, dict[str, Built]]:
    """Build the student and the teachers that run, without their weights.

    Teachers answer for ``num_classes``; ``heads``: sizes of teachers' own heads, by name.
    """
    student = build_student(recipe.student, num_classes, with_weights=False)
    if not trains_classifier(recipe, student.network):
        student = build_student(recipe.student, 0, with_weights=False)
    teachers = {}
    for name, config in recipe.teachers.items():
        if config.labels is not None:
            continue
        built = build_teacher_model(config, name, with_weights=False)
        readers = find_logit_readers(recipe.objectives, built.network)
        # Only loading the checkpoint could tell its head: assume none if nothing reads its logits,
        # else one, even for a network that timm builds without, such as DINOv3.
        if heads and name in heads:
            built = _with_classes(built, heads[name])
        elif config.checkpoint and not readers:
            built = _with_classes(built, 0)
        elif readers and not (built.network.num_classes or _loads_own_weights(config)):
            built = _with_classes(built, num_classes)
        if built.network.num_classes and find_logit_readers(recipe.objectives, built.network):
            built = replace(built, network=replace(built.network, num_classes=num_classes))
        teachers[name] = built
    return student, teachers


def trains_classifier(recipe: Recipe, student: Network) -> bool:
    """Return whether an objective trains the student's head."""
    return any(objective.trains_heads(student) for objective in recipe.objectives.values())


def _with_classes(built: Built, num_classes: int) -> Built:
    """Replace a network's head, in place, if its model can do that."""
    if not hasattr(built.model, "reset_classifier"):
        return built
    built.model.reset_classifier(num_classes)  # type: ignore[operator]
    old = built.network
    network = describe_network(built.model, old.name, old.architecture, built.spec.image_size)
    return replace(built, network=network)


def build_teacher(
    config: TeacherConfig,
    name: str,
    classes: tuple[str, ...],
    images_spec: InputSpec,
    device: torch.device | str,
    objectives: Mapping[str, Objective] | None = None,
    built: Built | None = None,
) -> tuple[Teacher, ClassMatch]:
    """Build a frozen teacher that answers for ``classes``, in their order; if empty, for its own.

    The classes need not match if none of ``objectives`` reads its logits (None: they are read).
    ``built``: its network, if it is built already.
    """
    built = built or build_teacher_model(config, name)
    network, index, names = built.network, None, weights.class_names(built.model)
    if objectives is not None and not find_logit_readers(objectives, network):
        match = ClassMatch(None, "only its features are read")
    else:
        count = network.num_classes
        order = _class_order(config, name, classes, count)
        if classes:
            match = match_classes(name, names, count, classes, config.reorder_classes, order)
        else:
            kept = "the images are unlabelled: its own classes are kept"
            match = ClassMatch(order, kept, names or ())
    if match.index is not None:
        network, index = replace(network, num_classes=len(match.index)), torch.tensor(match.index)
    teacher = Teacher(
        built.model,
        network,
        built.spec,
        images_spec,
        class_index=index,
        dtype=PRECISIONS[config.precision],
        device=device,
    )
    return teacher, match


def _class_order(
    config: TeacherConfig, name: str, classes: tuple[str, ...], count: int
) -> tuple[int, ...] | None:
    """Return the places that a recipe gives a teacher's classes; None: as they are."""
    order, field = config.class_order, f"teachers.{name}.class_order"
    if order == "same":
        return None
    places = natural_order(classes) if isinstance(order, str) else order
    if sorted(places) != [*range(count)]:
        what = f"{field} is {order!r}, which does not place the {count} classes of the {name}"
        raise ConfigError(what, Set(field, "same"))
    return places


@dataclass(frozen=True)
class Networks:
    """The networks of a run, on its device."""

    distillation: Distillation
    teachers: dict[str, Teacher]  # those that run
    # sha256 of each teacher's weights, also of those built only to be compared with the teacher
    # that made the labels.
    digests: dict[str, str]
    spec: InputSpec  # the student's
    classes: tuple[str, ...]  # what the student answers, in order; () without a classifier
    architecture: tuple[str, dict[str, Any]]  # timm name and arguments that rebuild the student


def build_networks(
    recipe: Recipe, classes: tuple[str, ...], device: torch.device, say: Say
) -> Networks:
    """Build the networks of a recipe and resolve its plan.

    The student answers for ``classes``, or for its teachers' if the images are unlabelled; it has
    no classifier if no objective trains one.
    """
    num_classes = max(len(classes), 1)
    # Only a built network tells which of its heads an objective trains: ask one on the meta device,
    # so that the student's weights are the first draws from the seed.
    with torch.device("meta"):
        blank = build_student(recipe.student, num_classes, with_weights=False)
    trained = trains_classifier(recipe, blank.network)
    torch.manual_seed(recipe.train.seed)
    student = build_student(recipe.student, num_classes if trained else 0)
    # Building a network draws numbers; adapters must start alike whether teachers run or not.
    with torch.random.fork_rng(devices=[]):
        teachers, answers = _build_teachers(recipe, classes, student.spec, device, say)
    if not trained:
        say("no objective trains a classifier: the network is built without one")
        classes = ()
    elif not classes:
        count, classes = _common_classes(answers)
        torch.manual_seed(recipe.train.seed)
        student = build_student(recipe.student, count)
    networks = {name: teacher.network for name, teacher in teachers.items()}
    plan = plan_of(recipe, student.network, networks)
    distillation = Distillation(student.model, plan).to(device)
    size = recipe.student.image_size
    args = recipe.student.model_args | ({} if size is None else {"img_size": size})
    return Networks(
        distillation,
        {name: teacher for name, teacher in teachers.items() if runs(recipe.teachers[name])},
        {name: weights_digest(teacher.model) for name, teacher in teachers.items()},
        evaluated_as_trained(student.spec, recipe.data.augment),
        classes,
        weights.describe(resolve_run(recipe.student.model), args),
    )


def _build_teachers(
    recipe: Recipe,
    classes: tuple[str, ...],
    images_spec: InputSpec,
    device: torch.device,
    say: Say,
) -> tuple[dict[str, Teacher], list[tuple[int, tuple[str, ...]]]]:
    """Build the teachers; return also the (number, names) of classes of those that answer."""
    stores, objectives = open_labels(recipe), recipe.objectives
    teachers: dict[str, Teacher] = {}
    answers: list[tuple[int, tuple[str, ...]]] = []
    for name, config in recipe.teachers.items():
        store = stores.get(name)
        if store is not None:
            network, names = stored_network(store, name), store.manifest.about.get("classes", ())
        # One with labels may still run, or be compared with the one that made them.
        if store is None or runs(config) or (config.model and not made_by(store, config)):
            teacher, match = build_teacher(config, name, classes, images_spec, device, objectives)
            teachers[name] = teacher
            rest = "; its run is not finished" if is_unfinished(config.model) else ""
            say(f"{name}: {teacher.network.architecture}, {match.remark}{rest}")
            if store is None:
                network, names = teacher.network, match.classes
        if find_logit_readers(objectives, network):
            answers.append((network.num_classes, tuple(names)))
    return teachers, answers


def _common_classes(answers: list[tuple[int, tuple[str, ...]]]) -> tuple[int, tuple[str, ...]]:
    """Return the number and the names (() where unknown) of classes that all teachers answer in."""
    counts = {count for count, _ in answers}
    names = {names for _, names in answers if names}
    if len(counts) != 1 or len(names) > 1:
        what = "unlabelled images need teachers that all answer in the same classes"
        raise ConfigError(what, field="teachers")
    return counts.pop(), names.pop() if names else ()


def runs(config: TeacherConfig) -> bool:
    """Return whether a teacher runs during training."""
    return config.labels is None or config.missing == "online"


def plan_of(recipe: Recipe, student: Network, teachers: Mapping[str, Network]) -> Plan:
    """Resolve a recipe's plan; stored teachers are described by their labels."""
    stores = open_labels(recipe)
    known = {
        name: stored_network(stores[name], name) if name in stores else teachers[name]
        for name in recipe.teachers
    }
    layouts = {name: store.layout for name, store in stores.items()}
    return make_plan(student, known, recipe.objectives, recipe.selector, recipe.masking, layouts)


def compile_networks(*runners: Distillation | Teacher) -> None:
    """Compile the ``run`` of networks; modules and names of weights stay as they are."""
    for it in runners:
        # Compiled code is cached by code object, a few variants each: give every network its own.
        run: Any = it.run
        known = run.__globals__, run.__name__, run.__defaults__, run.__closure__
        it.run = torch.compile(FunctionType(run.__code__.replace(), *known))


@contextmanager
def compile_errors(compiled: bool) -> Iterator[None]:
    """Turn whatever a compiler raises into `ConfigError`."""
    try:
        yield
    except Exception as error:
        if not compiled or isinstance(error, UserError | MemoryError | torch.OutOfMemoryError):
            raise
        what = f"the networks cannot be compiled ({first_line(error)})"
        raise ConfigError(what, Set("train.compile", False)) from error


def weights_digest(model: nn.Module) -> str:
    """Return the sha256 of everything a network computes with."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
