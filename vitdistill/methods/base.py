"""What a distillation method is made of.

An `Objective` is what supervision says; a `Masking` or a `TokenSelector` is what it costs. All are
frozen dataclasses whose fields are their configuration. They declare what they read, receive
recorded outputs, and never call a model: that is why any objective runs with any selector, live or
from stored answers.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import ConfigError
from ..vit.needs import Needs
from ..vit.network import Network
from ..vit.output import ViTOutput
from ..vit.patches import num_kept_patches


class Truth(Protocol):
    """The images of a batch and their labels.

    A mixed image has two labels, of weight ``lam`` and ``1 - lam``.
    """

    @property
    def images(self) -> Float[Tensor, "B 3 h w"]: ...
    @property
    def labels(self) -> Int[Tensor, " B"]: ...
    @property
    def mixed_labels(self) -> Int[Tensor, " B"] | None: ...
    @property
    def lam(self) -> Float[Tensor, " B"] | None: ...

    def uniforms(self, count: int) -> Float[Tensor, "B {count}"]:
        """Return uniform numbers in [0, 1), a pure function of the run's seed, sample and view."""
        ...


def require(ok: bool, field: str, value: object, wanted: str) -> None:
    """Raise `ConfigError` about the value of a method's field unless ``ok``."""
    if not ok:
        raise ConfigError(f"{field} is {value!r}", fix=f"give {wanted}", field=field)


def check_factors(**factors: float) -> None:
    """Raise `ConfigError` if a factor of a loss's terms is negative or infinite, or all are 0."""
    for name, factor in factors.items():
        require(0 <= factor < math.inf, name, factor, "a number that is not negative")
    require(any(factors.values()), " and ".join(factors), 0, "one of them a number above 0")


def block_pairs(
    field: str, student: tuple[int, ...], teacher: tuple[int, ...] | None
) -> list[tuple[int, int]]:
    """Pair the blocks of ``field`` with the teacher's (None: the same numbers)."""
    if teacher is None:
        return list(zip(student, student, strict=True))
    wanted = f"as many blocks of the teacher as the {len(student)} in {field}"
    require(len(teacher) == len(student), f"teacher_{field}", teacher, wanted)
    return list(zip(student, teacher, strict=True))


@dataclass(frozen=True, kw_only=True)
class WeightSchedule:
    """A loss weight that changes over the run.

    It is the objective's ``weight`` until ``begin``, then moves towards ``to``, reached at ``end``.

    Args:
        to: the weight at the end, at least 0.
        begin: where the change begins, as a fraction of the run, 0 to 1.
        end: where it ends, likewise, at least ``begin``; equal to it: at once.
        shape: of the change.
    """

    to: float
    begin: float = 0.0
    end: float = 1.0
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        require(0 <= self.to < math.inf, "schedule.to", self.to, "a number that is not negative")
        span, wanted = (self.begin, self.end), "fractions of the run, 0 to 1, in schedule.end too"
        require(0 <= span[0] <= span[1] <= 1, "schedule.begin", span, wanted)

    def at(self, weight: float, progress: float) -> float:
        """Return the weight after the fraction ``progress`` of the run; it began as ``weight``."""
        if progress >= self.end:
            return self.to
        if progress <= self.begin:
            return weight
        way = (progress - self.begin) / (self.end - self.begin)
        if self.shape == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        return weight + (self.to - weight) * way


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """A loss: what it reads of student and teacher, and how it compares them.

    The class variables are its facts: ``couples_images``: the loss of an image depends on the
    others in its micro-batch. ``needs_masking``: there is something to learn only from hidden
    patches. ``needs_every_patch``: the student cannot run on a part of its patches. For
    docs/methods.md: ``goes_with`` names the methods it is meant to stand beside, ``formula`` is
    what the weight multiplies (the plan prints it too), ``paper`` whose method it is, ``use_when``
    one sentence.

    Args:
        weight: what the loss is multiplied by before losses are summed; 0 only if a schedule
            raises it.
        schedule: how the weight changes over the run; None: not at all.
    """

    weight: float = 1.0
    schedule: WeightSchedule | None = None

    reads_teacher: ClassVar[bool] = True
    reads_labels: ClassVar[bool] = False
    couples_images: ClassVar[bool] = False
    needs_masking: ClassVar[bool] = False
    needs_every_patch: ClassVar[bool] = False
    goes_with: ClassVar[tuple[str, ...]] = ()
    formula: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    use_when: ClassVar[str] = ""

    def __post_init__(self) -> None:
        rises = self.schedule is not None and self.schedule.to > 0
        ok = 0 < self.weight < math.inf or (rises and self.weight == 0)
        require(ok, "weight", self.weight, "a number above 0, or leave the objective out")

    def weight_at(self, progress: float) -> float:
        """Return the weight after the fraction ``progress`` of the run."""
        return self.weight if self.schedule is None else self.schedule.at(self.weight, progress)

    def student_needs(self, student: Network) -> Needs:
        """Return what the objective reads of the student."""
        return Needs(logits=True)

    def teacher_needs(self, teacher: Network) -> Needs:
        """Return what the objective reads of its teacher."""
        return Needs(logits=self.reads_teacher)

    def check(self, student: Network, teacher: Network | None) -> None:  # noqa: B027  (most compare any pair)
        """Raise `ConfigError` for a pair this objective cannot compare."""

    def describe(self, student: Network, teacher: Network | None, num_keep: int | None) -> str:
        """Return what a reader of the plan should know, in a few words, or nothing.

        ``num_keep`` is how many of the teacher's patches both networks see; None: all.
        """
        return ""

    def trains_heads(self, student: Network) -> tuple[str, ...]:
        """Return the student's classifier heads that the loss reaches.

        By default all of them, if the prediction is read.
        """
        return student.heads if self.student_needs(student).logits else ()

    def adapter(self, student: Network, teacher: Network | None) -> nn.Module | None:
        """Return the objective's own trainable part, if any; it is trained and never exported."""
        return None

    def pictures(
        self, student: ViTOutput, batch: Truth, adapter: nn.Module | None
    ) -> dict[str, Float[Tensor, "B 3 h w"]]:
        """Return what there is to look at beside the input, in the student's normalisation."""
        return {}

    @abstractmethod
    def loss(
        self, student: ViTOutput, teacher: ViTOutput | None, batch: Truth, adapter: nn.Module | None
    ) -> Float[Tensor, ""]:
        """Return the unweighted loss, a float32 scalar: a mean over the batch."""


@dataclass(frozen=True, kw_only=True)
class TeacherObjective(Objective):
    """An objective that compares with a teacher.

    Args:
        teacher: the name of the teacher it reads.
    """

    teacher: str = "teacher"

    @property
    def teacher_temperatures(self) -> tuple[float, ...] | None:
        """The temperatures T at which it reads ``softmax(logits / T)``, and nothing else.

        (): it reads the order of the logits alone. None: the logits themselves, so stored ones have
        to be complete.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class Masking(ABC):
    """A choice of patches made before the student runs.

    The student sees no others, and its teachers see the same, or more.
    """

    paper: ClassVar[str] = ""  # as for an `Objective`
    use_when: ClassVar[str] = ""

    @abstractmethod
    def count(self, num_patches: int) -> int:
        """Return how many patches the student sees; raise `ConfigError` if none would be left."""

    @abstractmethod
    def teacher_count(self, num_patches: int) -> int:
        """Return how many patches the teachers see, at least `count`."""

    @abstractmethod
    def order(self, noise: Float[Tensor, "B N"]) -> Int[Tensor, "B N"]:
        """Return all patches of each image, those to be seen first.

        ``noise`` is uniform and keyed by sample and view.
        """


@dataclass(frozen=True, kw_only=True)
class TokenSelector(ABC):
    """A choice of the patches a teacher sees, made after the student ran.

    Args:
        teachers: names of the teachers it chooses for; empty: all of them.
        keep_rate: fraction of the teacher's own patches to keep, above 0 and at most 1; see
            `num_kept_patches` for the count.
        num_keep: the exact count instead; None: from ``keep_rate``.
    """

    keep_rate: float = 0.5
    num_keep: int | None = None
    teachers: tuple[str, ...] = ()

    paper: ClassVar[str] = ""  # as for an `Objective`
    use_when: ClassVar[str] = ""
    reads_noise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        rate, count = self.keep_rate, self.num_keep
        require(0 < rate <= 1, "selector.keep_rate", rate, "a fraction above 0 and at most 1")
        require(count is None or count >= 1, "selector.num_keep", count, "at least 1")

    def count(self, num_patches: int) -> int:
        """Return how many of ``num_patches`` are kept; raise `ConfigError` if there are fewer."""
        if self.num_keep is None:
            return num_kept_patches(num_patches, self.keep_rate)
        wanted = f"at most {num_patches}, as many as the teacher has"
        require(self.num_keep <= num_patches, "selector.num_keep", self.num_keep, wanted)
        return self.num_keep

    def student_needs(self, student: Network) -> Needs:
        """Return what the choice reads of the student."""
        return Needs()

    def teacher_needs(self, teacher: Network) -> Needs:
        """Return what the choice reads of the teacher on the whole image, in an extra pass."""
        return Needs()

    def check(self, student: Network, teacher: Network) -> None:  # noqa: B027  (some choose for any pair)
        """Raise `ConfigError` for a pair this selector cannot choose for."""

    @abstractmethod
    def select(
        self,
        grid: tuple[int, int],
        num_keep: int,
        student: ViTOutput,
        teacher: ViTOutput | None,
        noise: Float[Tensor, "B N"] | None,
    ) -> Int[Tensor, "B K"]:
        """Return row-major indices into the teacher's ``grid``.

        ``teacher`` is its answer to `teacher_needs` on the whole image; ``noise`` is uniform, keyed
        by sample and view, and given if ``reads_noise``.
        """


def describe_alignment(student: Network, teacher: Network, num_keep: int | None) -> str:
    """Say how patches of unequal networks meet: ``compared at the 98 of 196 patches both see``."""
    parts = []
    if num_keep is not None and num_keep < teacher.num_patches:
        parts.append(f"compared at the {num_keep} of {teacher.num_patches} patches both see")
    if student.walks and teacher.walks and student.grid != teacher.grid:
        of_student, of_teacher = (f"{n.grid[0]} x {n.grid[1]}" for n in (student, teacher))
        parts.append(f"the student's patches resampled from {of_student} to {of_teacher}")
    elif student.walks != teacher.walks:
        parts.append("the student's features resampled to the teacher's map by position")
    return ", ".join(parts)
