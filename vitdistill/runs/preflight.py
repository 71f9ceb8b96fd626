"""Preflight: before money is spent, every teacher is proved on a slice of the validation images."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..data.batch import Batch
from ..distill.teacher import Teacher
from ..errors import ConfigError, NonFiniteError, Set
from ..memory import SMALLER_EVALUATION, memory_errors
from ..vit.needs import Needs
from ..vit.output import ViTOutput
from ..world import World, agreed
from .orders import alignment, find_better_order, log_likelihoods

NUM_IMAGES = 512
_NUM_TRIED, _FEWEST = 256, 30  # images on which other normalisations and sizes are tried
_NORMALISATIONS = (  # ImageNet's mean and std, Inception's, none
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
)
_SPELLED = 20  # classes up to which a remedy spells their order


@dataclass(frozen=True)
class Proof:
    """A teacher's accuracy on ``num_images`` validation images, what its answers would reach
    without looking at them, and what is suspicious but not certain.
    """

    accuracy: float
    chance: float
    num_images: int
    doubts: tuple[ConfigError, ...] = ()


@torch.no_grad()
def prove_teacher(
    teacher: Teacher, batches: Iterable[Batch], classes: Sequence[str], world: World
) -> Proof:
    """Prove a teacher on this process's share of labelled images it has not been trained on; call
    it on every process.

    Args:
        batches: validation images in the student's normalisation.
        classes: of the data set, in the order of the logits.

    Raises:
        NonFiniteError: an answer is NaN or infinite.
        ConfigError: luck explains its answers, or another order of its classes does far better.
    """
    found, labels = [torch.empty(0, len(classes))], [torch.empty(0, dtype=torch.long)]
    shown: list[tuple[Tensor, Tensor, Tensor]] = []
    with world.together(), memory_errors("while the teacher was tried", SMALLER_EVALUATION):
        for batch in batches:
            found.append(_logits(_record(teacher, Needs(logits=True), batch.images)))
            labels.append(batch.labels.cpu())
            if sum(len(images) for images, _, _ in shown) < _NUM_TRIED:
                shown.append((batch.images, found[-1], labels[-1]))
        doubt = _doubt_input(teacher, shown)
    parts = world.gather((torch.cat(found), torch.cat(labels), doubt))
    answers, truth = torch.cat([a for a, _, _ in parts]), torch.cat([y for _, y, _ in parts])
    contract = next((doubt for _, _, doubt in parts if doubt is not None), None)
    return _judge(teacher, answers, truth, classes, contract)


def _judge(
    teacher: Teacher,
    logits: Float[Tensor, "N C"],
    labels: Int[Tensor, " N"],
    classes: Sequence[str],
    contract: ConfigError | None,
) -> Proof:
    """Compare answers with labels, the same on every process."""
    answers, count, where = logits.argmax(1), len(labels), f"teachers.{teacher.network.name}"
    accuracy = _accuracy(logits, labels)
    chance = chance_accuracy(labels, answers)
    # Few classes or images cannot show more: with K of C classes seen, perfection is the root of
    # (K - 1)(C - 1), and what a weak teacher shows grows with the root of the images.
    perfect = math.sqrt((len(labels.unique()) - 1) * (len(classes) - 1))
    enough = min(3.1, perfect / 2, 0.14 * math.sqrt(count))
    proven = accuracy > chance_level(chance, count) and alignment(logits, labels) > enough
    half_way = (1 + chance) / 2
    what = f"{_name(teacher)} is right on {accuracy:.1%} of {count} validation images"
    untrained, reordered = doubt_weights(teacher), None
    if untrained is not None and accuracy < half_way:
        raise agreed(untrained)
    order = find_better_order(logits, labels, classes)
    if order is not None:
        own, i = min((own, i) for i, own in enumerate(order.index) if own != i)
        fix = Set(f"{where}.class_order", "natural" if order.natural else [*order.index])
        spelled = teacher.class_index is None and (order.natural or len(classes) <= _SPELLED)
        reordered = ConfigError(
            f"{what}, and would be on {order.accuracy:.1%} with its classes in"
            f" {'their natural (2 before 10)' if order.natural else 'another'} order, where its"
            f" class {own} is the data set's {i}, {classes[i]!r}",
            fix if spelled else "give its config.json the names of its classes (label_names)",
            field=fix.field,
        )
        # A weak teacher confuses classes without being in another order.
        if order.certain or (not proven and (order.natural or order.accuracy > half_way)):
            raise agreed(reordered)
    if not proven:
        luck = ConfigError(
            f"{what}, which an untrained network reaches by luck (chance: {chance:.1%} for"
            f" {len(classes)} classes): its weights are not loaded, its classes are others, or its"
            " normalisation is not its own",
            field=where,
        )
        raise agreed(contract or luck)
    doubts = (untrained, reordered, contract)
    return Proof(accuracy, chance, count, tuple(doubt for doubt in doubts if doubt is not None))


@torch.no_grad()
def prove_features(teacher: Teacher, needs: Needs, batches: Iterable[Batch], world: World) -> None:
    """Check what is recorded of a teacher without a classifier to judge it by; call it on every
    process.

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
    """Return what a teacher records of images; raise `NonFiniteError` where it is no number."""
    output = teacher(images, needs)
    if not all(bool(recorded.isfinite().all()) for recorded in output.tensors()):
        what = f"{_name(teacher)} gives NaN or infinity on validation images"
        raise NonFiniteError(f"{what}: check its weights and precision")
    return output


def _logits(output: ViTOutput) -> Float[Tensor, "B C"]:
    assert output.logits is not None
    return output.logits.float().cpu()


def _name(teacher: Teacher) -> str:
    return f"the {teacher.network.name} ({teacher.network.architecture})"


def doubt_weights(teacher: Teacher) -> ConfigError | None:
    """Return an error if most norms of a network are as they begin: scales and shifts constant."""
    owned = [list(module.parameters(recurse=False)) for module in teacher.model.modules()]
    norms = [vector for own in owned if all(p.ndim == 1 for p in own) for vector in own]
    if 2 * sum(bool((vector == vector[0]).all()) for vector in norms) <= len(norms):
        return None
    what = f"{_name(teacher)} looks untrained: its norms are as they begin, ones and zeros"
    fix = Set(f"teachers.{teacher.network.name}.checkpoint", "FILE")
    return ConfigError(what, fix, field=fix.field)


def _doubt_input(
    teacher: Teacher, shown: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> ConfigError | None:
    """Return an error if answers are clearly better with another mean and std, or at half or twice
    the size where a network takes any.

    ``shown`` holds batches of images, answers and labels.
    """
    spec, config = teacher.spec, getattr(teacher.model, "pretrained_cfg", None) or {}
    others = [replace(spec, mean=mean, std=std) for mean, std in _NORMALISATIONS]
    if not hasattr(teacher.model, "patch_embed") and not config.get("fixed_input_size"):
        height, width = spec.image_size
        for size in ((max(height // 2, 32), max(width // 2, 32)), (2 * height, 2 * width)):
            others.append(replace(spec, image_size=size))
    doubt, best = None, 0.0
    for other in others:
        # A larger size is tried on fewer images, so that it costs as much.
        every = math.ceil(math.prod(other.image_size) / math.prod(spec.image_size))
        few = [(images[::every], own[::every], y[::every]) for images, own, y in shown]
        if other == spec or sum(len(y) for _, _, y in few) < _FEWEST:
            continue
        try:
            told = teacher.with_spec(other)
            answers = [
                _logits(told(images, Needs(logits=True))).nan_to_num() for images, _, _ in few
            ]
        except RuntimeError:  # a network may take no other size
            continue
        labels = torch.cat([y for _, _, y in few])
        now, then = torch.cat([own for _, own, _ in few]), torch.cat(answers)
        each = [log_likelihoods(x, [labels]).gather(1, labels[:, None]) for x in (now, then)]
        gain, (before, after) = each[1] - each[0], (_accuracy(x, labels) for x in (now, then))
        mean = float(gain.mean())
        if after <= before or mean < max(best, 3 * float(gain.std()) / math.sqrt(len(labels))):
            continue
        fix = Set(f"teachers.{teacher.network.name}.image_size", other.image_size[0])
        how = f"images of {other.image_size[0]} pixels"
        if other.image_size == spec.image_size:
            overlay = {"mean": [*other.mean], "std": [*other.std]}
            place = f"teachers.{teacher.network.name}.model_args.pretrained_cfg_overlay"
            how, fix = str(overlay), Set(place, overlay)
        what = f"{_name(teacher)} is right on {before:.1%} of {len(labels)} validation images as it"
        what = f"{what} is given them, and on {after:.1%} with {how}"
        doubt, best = ConfigError(what, fix, field=fix.field), mean
    return doubt


def _accuracy(logits: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> float:
    return float((logits.argmax(1) == labels).double().mean())


def chance_accuracy(labels: Int[Tensor, " N"], answers: Int[Tensor, " N"]) -> float:
    """The accuracy if answers had nothing to do with labels; 1/C only where both are balanced."""
    size = int(torch.cat((labels, answers)).max()) + 1
    counts = (every.bincount(minlength=size).double() for every in (labels, answers))
    return float(torch.stack([*counts]).prod(0).sum()) / len(labels) ** 2


def chance_level(chance: float, count: int) -> float:
    """The accuracy a guess stays below, but for one time in a thousand; at most 0.1 above chance:
    few images do not condemn a useful teacher.
    """
    return chance + min(3.1 * math.sqrt(chance * (1 - chance) / max(count, 1)), 0.1)
