"""What a distillation method is made of: an `Objective` (what supervision says), and what it costs:
a `Masking` or a `TokenSelector`.

All are frozen dataclasses whose fields are their configuration. They declare what they read,
receive recorded outputs, and never call a model: that is why any objective runs with any selector,
live or from stored answers.
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


class Labelled(Protocol):
    """The images of a batch and their ground truth; a mixed image has two labels, of weight ``lam``
    and ``1 - lam``.
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
        """Uniform random numbers in [0, 1): a pure function of the run's seed, the sample and its
        view, whatever shares the batch.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class WeightSchedule:
    """A loss weight that changes over the run: the objective's ``weight`` until ``begin``, then
    towards ``to``, reached at ``end``.

    Args:
        to: the weight at the end, at least 0.
        begin: where the change begins, as a fraction of the run, 0 to 1.
        end: where it ends, as a fraction of the run, at least ``begin``; equal to it: at once.
        shape: of the change.
    """

    to: float
    begin: float = 0.0
    end: float = 1.0
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.to) and self.to >= 0):
            raise ConfigError(
                f"the schedule of a weight ends at {self.to!r}: give a number that is not negative"
                " (schedule.to)"
            )
        if not 0 <= self.begin <= self.end <= 1:
            raise ConfigError(
                f"the schedule of a weight runs from {self.begin!r} to {self.end!r}: give fractions"
                " of the run, 0 to 1, begin before end"
            )

    def at(self, weight: float, progress: float) -> float:
        """The weight after the fraction ``progress`` of the run, when it was ``weight`` at
        first.
        """
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

    Args:
        weight: what the loss is multiplied by before all losses are summed; 0 only where a schedule
            raises it.
        schedule: how the weight changes over the run; None: not at all.
    """

    weight: float = 1.0
    schedule: WeightSchedule | None = None

    reads_teacher: ClassVar[bool] = True
    reads_labels: ClassVar[bool] = False
    couples_images: ClassVar[bool] = (
        False  # the loss of an image depends on the others in its micro-batch
    )
    needs_masking: ClassVar[bool] = (
        False  # there is nothing to learn from patches that nobody hides
    )
    needs_every_patch: ClassVar[bool] = False  # of the student: it cannot run on a part of them
    goes_with: ClassVar[
        tuple[str, ...]
    ] = ()  # names of the methods it is meant to stand beside; docs/methods.md counts it with them
    formula: ClassVar[str] = ""  # what the weight multiplies, for the plan's print-out
    paper: ClassVar[str] = ""  # for docs/methods.md: whose method it is
    use_when: ClassVar[str] = ""  # for docs/methods.md: one sentence

    def __post_init__(self) -> None:
        rises = self.schedule is not None and self.schedule.to > 0
        if not (
            isinstance(self.weight, int | float)
            and math.isfinite(self.weight)
            and (self.weight > 0 or (rises and self.weight == 0))
        ):
            raise ConfigError(
                f"the weight of {type(self).__name__} is {self.weight!r}: give a number above 0, or"
                " leave the objective out"
            )

    def weight_at(self, progress: float) -> float:
        """The weight after the fraction ``progress`` of the run."""
        return self.weight if self.schedule is None else self.schedule.at(self.weight, progress)

    def student_needs(self, student: Network) -> Needs:
        """What the objective reads of the student."""
        return Needs(logits=True)

    def teacher_needs(self, teacher: Network) -> Needs:
        """What the objective reads of its teacher."""
        return Needs(logits=self.reads_teacher)

    def check(self, student: Network, teacher: Network | None) -> None:  # noqa: B027  (most compare any pair)
        """Refuse a pair this objective cannot compare; raises `ConfigError` with one sentence."""

    def describe(self, student: Network, teacher: Network | None, num_keep: int | None) -> str:
        """What a reader of the plan should know of this objective between these two networks, in a
        few words; or nothing.

        ``num_keep`` is how many of the teacher's patches both networks see; None: all.
        """
        return ""

    def trains_heads(self, student: Network) -> tuple[str, ...]:
        """Which of the student's classifier heads the loss reaches; by default all of them where it
        reads the prediction.
        """
        return student.heads if self.student_needs(student).logits else ()

    def adapter(self, student: Network, teacher: Network | None) -> nn.Module | None:
        """The objective's own trainable part (a projection, a generator), or None; it is trained
        and never exported.
        """
        return None

    def pictures(
        self, student: ViTOutput, batch: Labelled, adapter: nn.Module | None
    ) -> dict[str, Float[Tensor, "B 3 h w"]]:
        """What there is to look at beside the input, by what it shows, in the student's
        normalisation; most objectives have nothing.
        """
        return {}

    @abstractmethod
    def loss(
        self,
        student: ViTOutput,
        teacher: ViTOutput | None,
        batch: Labelled,
        adapter: nn.Module | None,
    ) -> Float[Tensor, ""]:
        """The unweighted loss, a float32 scalar: a mean over the batch."""


@dataclass(frozen=True, kw_only=True)
class TeacherObjective(Objective):
    """An objective that compares with a teacher.

    Args:
        teacher: the name of the teacher it reads.
    """

    teacher: str = "teacher"

    @property
    def teacher_temperatures(self) -> tuple[float, ...] | None:
        """The temperatures T at which it takes ``softmax(logits / T)`` of the teacher's logits,
        reading nothing else of them.

        (): their order alone. None: the logits themselves; stored ones then have to be complete.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class Masking(ABC):
    """A choice of patches made before the student runs: it sees no others, and its teachers see the
    same, or more.
    """

    paper: ClassVar[str] = ""  # as for an `Objective`
    use_when: ClassVar[str] = ""

    @abstractmethod
    def count(self, num_patches: int) -> int:
        """How many of ``num_patches`` patches the student sees; raises `ConfigError` when none
        would be left.
        """

    @abstractmethod
    def teacher_count(self, num_patches: int) -> int:
        """How many the teachers see, at least `count`."""

    @abstractmethod
    def order(self, noise: Float[Tensor, "B N"]) -> Int[Tensor, "B N"]:
        """All patches of each image, those to be seen first; ``noise`` is uniform and keyed by
        sample and view.
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
        rate = self.keep_rate
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:
            raise ConfigError(
                f"keep_rate is {rate!r}: give the fraction of patches the teacher sees, above 0 and"
                " at most 1"
            )
        count = self.num_keep
        if count is not None and (
            isinstance(count, bool) or not isinstance(count, int) or count < 1
        ):
            raise ConfigError(
                f"num_keep is {self.num_keep!r}: give the number of patches the teacher sees, at"
                " least 1"
            )

    def count(self, num_patches: int) -> int:
        """How many of a teacher's ``num_patches`` patches are kept; raises `ConfigError` when there
        are not that many.
        """
        if self.num_keep is None:
            return num_kept_patches(num_patches, self.keep_rate)
        if self.num_keep > num_patches:
            raise ConfigError(
                f"num_keep is {self.num_keep}, but the teacher has only {num_patches} patches"
            )
        return self.num_keep

    def student_needs(self, student: Network) -> Needs:
        """What the choice reads of the student."""
        return Needs()

    def teacher_needs(self, teacher: Network) -> Needs:
        """What the choice reads of the teacher on the whole image, at the price of that extra
        pass.
        """
        return Needs()

    def check(self, student: Network, teacher: Network) -> None:  # noqa: B027  (some choose for any pair)
        """Refuse a pair this selector cannot choose for; raises `ConfigError` with one sentence."""

    @abstractmethod
    def select(
        self,
        grid: tuple[int, int],
        num_keep: int,
        student: ViTOutput,
        teacher: ViTOutput | None,
        noise: Float[Tensor, "B N"] | None,
    ) -> Int[Tensor, "B K"]:
        """Row-major indices into the teacher's ``grid``.

        ``teacher`` is its answer to `teacher_needs` on the whole image; ``noise`` uniform numbers
        keyed by sample and view if ``reads_noise``.
        """


def describe_alignment(student: Network, teacher: Network, num_keep: int | None) -> str:
    """How patches of unequal networks meet, for the plan: ``compared at the 98 of 196 patches both
    see, ...``.
    """
    parts = []
    if num_keep is not None and num_keep < teacher.num_patches:
        parts.append(f"compared at the {num_keep} of {teacher.num_patches} patches both see")
    if student.walks and teacher.walks and student.grid != teacher.grid:
        ours, its = (f"{network.grid[0]} x {network.grid[1]}" for network in (student, teacher))
        parts.append(f"the student's patches resampled from {ours} to {its}")
    elif student.walks != teacher.walks:
        parts.append("the student's features resampled to the teacher's map by position")
    return ", ".join(parts)
