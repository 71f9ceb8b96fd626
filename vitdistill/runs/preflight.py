"""Preflight: prove every teacher on a slice of the validation images, before money is spent."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..data.augment import InputSpec
from ..data.batch import Batch
from ..data.loader import EvalLoader
from ..distill.step import Distillation
from ..distill.teacher import Teacher
from ..errors import ConfigError, Fix, NonFiniteError, Set, UserError
from ..memory import SMALLER_EVALUATION, memory_errors
from ..vit.needs import Needs
from ..vit.output import ViTOutput
from ..vit.walk import run_vit
from ..world import World, agreed
from .orders import Reordering, alignment, find_better_order, log_likelihoods

NUM_IMAGES = 512
MANY = 0.03  # accuracy a teacher may lose by how images are cut before a warning
_NUM_TRIED, _FEWEST = 256, 30  # images on which other normalisations and sizes are tried
_NORMALISATIONS = (  # ImageNet's mean and std, Inception's, none
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
)
_SPELLED = 20  # up to this many classes a remedy spells their order

_Answered = tuple[Tensor, Tensor, Tensor]  # images, logits and labels


def describe_accuracy(accuracy: float, num_images: int) -> str:
    """Describe a teacher's accuracy when it was proved."""
    tried = f"{num_images:,} validation images (at most {NUM_IMAGES} are tried)"
    return f"right on {accuracy:.1%} of {tried}, as the student sees them"


@dataclass(frozen=True)
class Proof:
    """A teacher's accuracy on ``num_images`` validation images, what its answers would reach by
    chance, and what is suspicious but not certain.
    """

    accuracy: float
    chance: float
    num_images: int
    doubts: tuple[ConfigError, ...] = ()


@torch.no_grad()
def prove_teacher(
    teacher: Teacher,
    batches: Iterable[Batch],
    classes: Sequence[str],
    world: World,
    accept: bool = False,
) -> Proof:
    """Prove a teacher on this process's share of labelled images it has not been trained on; call
    it on every process.

    Args:
        batches: validation images in the student's normalisation.
        classes: of the data set, in the order of the logits.
        accept: only doubt answers that luck explains.

    Raises:
        NonFiniteError: an answer is NaN or infinite.
        ConfigError: luck explains its answers, or another order of its classes does far better.
    """
    found, labels = [torch.empty(0, len(classes))], [torch.empty(0, dtype=torch.long)]
    shown: list[_Answered] = []
    with world.together(), memory_errors("while the teacher was tried", SMALLER_EVALUATION):
        for batch in batches:
            found.append(_answer(teacher, batch.images))
            labels.append(batch.labels.cpu())
            if sum(len(images) for images, _, _ in shown) < _NUM_TRIED:
                shown.append((batch.images, found[-1], labels[-1]))
        doubt = _doubt_input(teacher, shown)
    parts = world.gather((torch.cat(found), torch.cat(labels), doubt))
    answers, truth, doubts = zip(*parts, strict=True)
    misfit = next((doubt for doubt in doubts if doubt is not None), None)
    return _judge(teacher, torch.cat(answers), torch.cat(truth), classes, misfit, accept)


def _judge(
    teacher: Teacher,
    logits: Float[Tensor, "N C"],
    labels: Int[Tensor, " N"],
    classes: Sequence[str],
    misfit: ConfigError | None,
    accept: bool,
) -> Proof:
    """Compare answers with labels, the same on every process."""
    where = f"teachers.{teacher.network.name}"
    accuracy, chance = _accuracy(logits, labels), chance_accuracy(labels, logits.argmax(1))
    # Few classes or images limit the alignment: with K of C classes seen, a perfect teacher reaches
    # sqrt((K - 1)(C - 1)), and a weak one's grows with the root of the number of images.
    perfect = math.sqrt((len(labels.unique()) - 1) * (len(classes) - 1))
    enough = min(3.1, perfect / 2, 0.14 * math.sqrt(len(labels)))
    untrained = doubt_weights(teacher) if accuracy < (1 + chance) / 2 else None
    proven = untrained is None and accuracy > chance and alignment(logits, labels) > enough
    what = f"{_name(teacher)} is right on {accuracy:.1%} of {len(labels)} validation images"
    order = find_better_order(logits, labels, classes)
    reordered = None if order is None else _doubt_order(teacher, classes, order, what)
    doubts = [doubt for doubt in (untrained, misfit, reordered) if doubt is not None]
    if not (proven or doubts):
        luck = (
            f"{what}, which an untrained network reaches by luck (chance: {chance:.1%} for"
            f" {len(classes)} classes); perhaps it was trained too briefly, or its weights,"
            " classes or normalisation are wrong"
        )
        fixes = "train it for more epochs", "train it in smaller batches", "check its weights"
        doubts = [ConfigError(luck, fixes, field=where)]
    # A weak teacher confuses classes without being in another order.
    certain = order is not None and order.certain
    if certain or not (proven or accept):
        if not certain and doubts[0] not in (misfit, reordered):
            doubts[0].fixes += (Set(f"{where}.accept_unproven", True),)
        raise agreed(doubts[0])
    return Proof(accuracy, chance, len(labels), tuple(doubts))


def _doubt_order(
    teacher: Teacher, classes: Sequence[str], order: Reordering, what: str
) -> ConfigError:
    """Return the error of classes in the wrong order; ``what``: how often the teacher is right."""
    own, i = min((own, i) for i, own in enumerate(order.index) if own != i)
    field = f"teachers.{teacher.network.name}.class_order"
    fix: Fix = Set(field, "natural" if order.natural else [*order.index])
    if teacher.class_index is not None or not (order.natural or len(classes) <= _SPELLED):
        fix = "give its config.json the names of its classes (label_names)"
    how = "their natural (2 before 10)" if order.natural else "another"
    what += f", and would be on {order.accuracy:.1%} with its classes in {how} order, in which its"
    what += f" class {own} is the data set's class {i}, {classes[i]!r}"
    return ConfigError(what, fix, field=field)


@torch.no_grad()
def doubt_views(
    teacher: Teacher, proof: Proof, images: EvalLoader, world: World
) -> ConfigError | None:
    """Return an error if a teacher is more than `MANY` better on images cut as it was made for;
    call it on every process.

    ``images``: this process's share of the images of ``proof``, as the student sees them.
    """
    own, seen = teacher.spec, images.spec
    cut = replace(own, mean=seen.mean, std=seen.std, interpolation=seen.interpolation)
    if cut == seen:
        return None
    right = torch.zeros(2, dtype=torch.float64)
    with world.together(), memory_errors("while the teacher was tried", SMALLER_EVALUATION):
        for batch in images.cut_as(cut):
            found = _answer(teacher, batch.images).argmax(1) == batch.labels.cpu()
            right += torch.tensor([found.sum(), len(found)])
    hits, count = torch.stack(world.gather(right)).sum(0).tolist()
    if hits / count <= proof.accuracy + MANY:
        return None
    fixes: tuple[Fix, ...] = ("train it on images that are cut as the student's",)
    if seen.crop_pct == 1.0 > own.crop_pct:
        fixes += (Set("data.augment.crop", "rrc"),)
    if seen.image_size != own.image_size:
        fixes += (Set("student.image_size", own.image_size[0]),)
    return ConfigError(
        f"{_name(teacher)} is right on {hits / count:.1%} of these images cut as it expects them"
        f" ({_views(own)}), and on {proof.accuracy:.1%} as the student sees them ({_views(seen)})",
        fixes,
        field="data.augment",
    )


@torch.no_grad()
def accuracy_on_chosen(
    distillation: Distillation, teacher: Teacher, batches: Iterable[Batch], world: World
) -> float:
    """Return a teacher's accuracy on the patches chosen for it; call it on every process.

    One that never saw partial images may lose much of its accuracy on them, and of its worth.
    """
    plan, right = distillation.plan, torch.zeros(2, dtype=torch.float64)
    distillation.eval()
    with world.together(), memory_errors("while the teacher was tried", SMALLER_EVALUATION):
        for batch in batches:
            output = run_vit(distillation.student, batch.images, plan.student_needs)
            keep = distillation.choose(teacher.network.name, teacher, batch, output)
            logits = teacher(batch.images, Needs(logits=True), keep).logits
            assert logits is not None
            found = (logits.argmax(1) == batch.labels).cpu()
            right += torch.tensor([found.sum(), len(found)])
    hits, count = torch.stack(world.gather(right)).sum(0).tolist()
    return float(hits / count)


def _views(spec: InputSpec) -> str:
    part = f"the middle {spec.crop_pct:.0%}" if spec.crop_pct < 1 else "whole images"
    return f"{part}, {spec.image_size[1]} x {spec.image_size[0]} pixels"


@torch.no_grad()
def prove_features(teacher: Teacher, needs: Needs, batches: Iterable[Batch], world: World) -> None:
    """Check what is recorded of a teacher whose logits are not read; call it on every process.

    Raises:
        NonFiniteError: something recorded is NaN or infinite.
        ConfigError: it is the same for every image, which no trained network gives.
    """
    with world.together(), memory_errors("while the teacher was tried", SMALLER_EVALUATION):
        for batch in batches:
            for recorded in _record(teacher, needs, batch.images).tensors():
                if len(recorded) > 1 and bool((recorded == recorded[:1]).all()):
                    what = f"{_name(teacher)} gives the same features for every image"
                    raise ConfigError(f"{what}: its weights are not loaded")


def _record(teacher: Teacher, needs: Needs, images: Float[Tensor, "B 3 H W"]) -> ViTOutput:
    """Return what a teacher records of images; raise `NonFiniteError` unless all is finite."""
    output = teacher(images, needs)
    if not all(bool(recorded.isfinite().all()) for recorded in output.tensors()):
        what = f"{_name(teacher)} gives NaN or infinity on validation images"
        raise NonFiniteError(f"{what}: check its weights and precision")
    return output


def _answer(teacher: Teacher, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C"]:
    logits = _record(teacher, Needs(logits=True), images).logits
    assert logits is not None
    return logits.float().cpu()


def _name(teacher: Teacher) -> str:
    name, network = teacher.network.name, teacher.network.architecture
    return f"the teacher ({network})" if name == "teacher" else f"the teacher {name!r} ({network})"


def doubt_weights(teacher: Teacher) -> ConfigError | None:
    """Return an error if most norms of a network look untrained: constant scales and shifts."""
    owned = [list(module.parameters(recurse=False)) for module in teacher.model.modules()]
    norms = [vector for own in owned if all(p.ndim == 1 for p in own) for vector in own]
    if 2 * sum(bool((vector == vector[0]).all()) for vector in norms) <= len(norms):
        return None
    what = f"{_name(teacher)} looks untrained: its norms are as they begin, ones and zeros"
    return ConfigError(what, Set(f"teachers.{teacher.network.name}.checkpoint", "FILE"))


def _doubt_input(teacher: Teacher, shown: Sequence[_Answered]) -> ConfigError | None:
    """Return an error if answers are clearly better with another mean and std, or another size."""
    doubt, best = None, 0.0
    for spec, fix in _other_inputs(teacher):
        # A larger size is tried on fewer images, so that it costs as much.
        every = math.ceil(math.prod(spec.image_size) / math.prod(teacher.spec.image_size))
        few = [(images[::every], own[::every], y[::every]) for images, own, y in shown]
        labels = torch.cat([y for _, _, y in few]) if few else torch.empty(0)
        if spec == teacher.spec or len(labels) < _FEWEST:
            continue
        try:
            other = teacher.with_spec(spec)
            then = torch.cat([_answer(other, images) for images, _, _ in few])
        except (AssertionError, RuntimeError, UserError):  # a network may take no other size
            continue
        now = torch.cat([own for _, own, _ in few])
        gain = log_likelihoods(then, labels) - log_likelihoods(now, labels)
        before, after, mean = _accuracy(now, labels), _accuracy(then, labels), float(gain.mean())
        if after > before and mean > max(best, 3 * float(gain.std()) / math.sqrt(len(labels))):
            what = f"{_name(teacher)} is right on {before:.1%} of {len(labels)} validation images"
            what = f"{what}, and on {after:.1%} with another input"
            doubt, best = ConfigError(what, fix), mean
    return doubt


def _other_inputs(teacher: Teacher) -> Iterator[tuple[InputSpec, Set]]:
    """Yield what else a teacher may have been trained with, and how a recipe says so."""
    where, spec = f"teachers.{teacher.network.name}", teacher.spec
    for mean, std in _NORMALISATIONS:
        overlay = {"mean": [*mean], "std": [*std]}
        fix = Set(f"{where}.model_args.pretrained_cfg_overlay", overlay)
        yield replace(spec, mean=mean, std=std), fix
    height, width = spec.image_size
    for size in ((max(height // 2, 16), max(width // 2, 16)), (2 * height, 2 * width)):
        yield replace(spec, image_size=size), Set(f"{where}.image_size", size[0])


def _accuracy(logits: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> float:
    return float((logits.argmax(1) == labels).double().mean())


def chance_accuracy(labels: Int[Tensor, " N"], answers: Int[Tensor, " N"]) -> float:
    """Return the accuracy of answers independent of the labels; 1/C if either is balanced."""
    size = int(torch.cat((labels, answers)).max()) + 1
    counts = (every.bincount(minlength=size).double() for every in (labels, answers))
    return float(torch.stack([*counts]).prod(0).sum()) / len(labels) ** 2
