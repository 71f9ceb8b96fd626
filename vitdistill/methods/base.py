"""What a distillation method is made of.

An `Objective` is what supervision says; a `Masking` or a `TokenSelector` is what it costs. All are
frozen dataclasses whose fields are their configuration. They declare what they read, receive
recorded outputs, and never call a model: that is why any objective runs with any selector, live or
from stored answers.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Literal, Protocol

from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import ConfigError, Drop
from ..option import check_options, option
from ..vit.needs import Needs
from ..vit.network import Network
from ..vit.output import ViTOutput
from ..vit.patches import num_kept_patches

Scalar = Float[Tensor, ""]
Grid = tuple[int, int]
Keep = Int[Tensor, "B K"]
Noise = Float[Tensor, "B N"] | None


class Truth(Protocol):
    """The images of a batch and their labels.

    A mixed image has two labels, of weight ``lam`` and ``1 - lam``.
    """

    images: Float[Tensor, "B 3 h w"]
    labels: Int[Tensor, " B"]
    mixed_labels: Int[Tensor, " B"] | None
    lam: Float[Tensor, " B"] | None

    def uniforms(self, count: int) -> Float[Tensor, "B {count}"]:
        """Return uniform numbers in [0, 1), a pure function of the run's seed, sample and view."""
        ...


def require(ok: object, field: str, value: object, wanted: str) -> None:
    """Raise `ConfigError` unless ``ok``: for fields that depend on each other or on networks."""
    if not ok:
        raise ConfigError(f"{field} is {value!r}", fix=f"give {wanted}", field=field)


def block_pairs(
    field: str, student: tuple[int, ...], teacher: tuple[int, ...] | None
) -> list[tuple[int, int]]:
    """Pair the blocks of ``field`` with the teacher's (None: the same numbers)."""
    teacher = student if teacher is None else teacher
    wanted = f"as many blocks of the teacher as the {len(student)} in {field}"
    require(len(teacher) == len(student), f"teacher_{field}", teacher, wanted)
    return list(zip(student, teacher, strict=True))


@dataclass(frozen=True, kw_only=True)
class WeightSchedule:
    """A loss weight that is the objective's ``weight`` until ``begin`` and ``to`` from ``end``."""

    to: float = option(MISSING, "the weight at the end", at_least=0)
    begin: float = option(0.0, "fraction of the run before the change", at_least=0, at_most=1)
    end: float = option(1.0, "fraction of the run at which it ends", at_least=0, at_most=1)
    shape: Literal["linear", "cosine"] = option("linear", "shape of the change")

    def __post_init__(self) -> None:
        check_options(self, "schedule")
        require(self.begin <= self.end, "schedule.begin", self.begin, "at most schedule.end")

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

    ``teacher`` is None in all methods of one that is no `TeacherObjective`; ``adapter`` is what its
    own method returned.
    """

    weight: float = option(1.0, "weight of the loss in the sum; 0 only with a schedule", at_least=0)
    schedule: WeightSchedule | None = option(None, "how the weight changes; null: not at all")

    reads_teacher: ClassVar[bool] = True
    reads_labels: ClassVar[bool] = False
    couples_images: ClassVar[bool] = False  # an image's loss depends on the rest of its micro-batch
    needs_masking: ClassVar[bool] = False  # it learns from hidden patches only
    needs_every_patch: ClassVar[bool] = False  # the student cannot run on a part of its patches
    terms: ClassVar[tuple[str, ...]] = ()  # fields of its terms' weights; one has to be above 0
    goes_with: ClassVar[tuple[str, ...]] = ()  # methods it is meant to stand beside
    formula: ClassVar[str] = ""  # what the weight multiplies; the plan prints it
    paper: ClassVar[str] = ""  # whose method it is; this and the next are for docs/methods.md
    use_when: ClassVar[str] = ""  # one sentence

    def __post_init__(self) -> None:
        check_options(self, "")
        counts = self.weight > 0 or (self.schedule is not None and self.schedule.to > 0)
        require(counts, "weight", self.weight, "a number above 0, or leave the objective out")
        if self.terms:
            factors = [getattr(self, name) for name in self.terms]
            require(any(factors), self.terms[0], 0, "a number above 0, to it or to another term")

    def weight_at(self, progress: float) -> float:
        """Return the weight after the fraction ``progress`` of the run."""
        return self.weight if self.schedule is None else self.schedule.at(self.weight, progress)

    def student_needs(self, student: Network) -> Needs:
        """Return what the objective reads of the student."""
        return Needs(logits=True)

    def teacher_needs(self, teacher: Network) -> Needs:
        """Return what the objective reads of its teacher."""
        return Needs(logits=self.reads_teacher)

    def check(self, student: Network, teacher: Any) -> None:  # noqa: B027  (most compare any pair)
        """Raise `ConfigError` for a pair this objective cannot compare."""

    def describe(self, student: Network, teacher: Any, num_keep: int | None) -> str:
        """Return what a reader of the plan should know, in a few words, or nothing.

        ``num_keep`` is how many of the teacher's patches both networks see; None: all.
        """
        return ""

    def trains_heads(self, student: Network) -> tuple[str, ...]:
        """Return the student's heads that the loss reaches: all, if it reads the prediction."""
        return student.heads if self.student_needs(student).logits else ()

    def adapter(self, student: Network, teacher: Any) -> nn.Module | None:
        """Return the objective's own trainable part, if any; it is trained and never exported."""
        return None

    def pictures(
        self, student: ViTOutput, batch: Truth, adapter: Any
    ) -> dict[str, Float[Tensor, "B 3 h w"]]:
        """Return pictures to show beside the input, in the student's normalisation."""
        return {}

    @abstractmethod
    def loss(self, student: ViTOutput, teacher: Any, batch: Truth, adapter: Any) -> Scalar:
        """Return the unweighted loss, a float32 scalar: a mean over the batch."""


@dataclass(frozen=True, kw_only=True)
class TeacherObjective(Objective):
    """An objective that compares with a teacher."""

    teacher: str = option("teacher", "the name of the teacher it reads")

    @property
    def teacher_temperatures(self) -> tuple[float, ...] | None:
        """The temperatures T at which it reads ``softmax(logits / T)``, and nothing else.

        (): it reads the order of the logits alone. None: the logits themselves, so stored ones have
        to be complete.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class Masking(ABC):
    """A choice, before the student runs, of the patches it sees; its teachers see no fewer."""

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
    """A choice of the patches a teacher sees, made after the student ran."""

    keep_rate: float = option(0.5, "fraction of the teacher's patches to keep", above=0, at_most=1)
    num_keep: int | None = option(
        None, "patches to keep, not a fraction; null: by `keep_rate`", at_least=1
    )
    teachers: tuple[str, ...] = option((), "the teachers it chooses for; empty: all of them")

    paper: ClassVar[str] = ""  # as for an `Objective`
    use_when: ClassVar[str] = ""
    reads_noise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self, "selector")

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

    def check(self, student: Network, teacher: Network) -> None:
        """Raise `ConfigError` for a pair this selector cannot choose for."""
        if not teacher.walks:
            which = f"the {teacher.name} ({teacher.architecture})"
            what = f"{type(self).__name__} shows a teacher some patches, and {which} needs them all"
            fix = Drop("selector"), "take a plain ViT as teacher"
            raise ConfigError(what, fix, field="selector.teachers")

    @abstractmethod
    def select(
        self, grid: Grid, num_keep: int, student: ViTOutput, teacher: ViTOutput | None, noise: Noise
    ) -> Keep:
        """Return row-major indices into the teacher's ``grid``.

        ``teacher`` is its answer to `teacher_needs` on the whole image; ``noise`` is uniform, keyed
        by sample and view, and given if ``reads_noise``.
        """
