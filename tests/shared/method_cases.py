"""A student, a teacher, a batch and one method between them: what the contract suite stands on."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import small_vits
import torch
from small_vits import DISTILLED, TEACHER, WALKED, network, teacher_of
from torch import Tensor, nn

from vitdistill.data.batch import Batch
from vitdistill.distill.plan import Plan, make_plan
from vitdistill.distill.step import Distillation
from vitdistill.errors import ConfigError
from vitdistill.methods import METHODS, method_class
from vitdistill.methods.base import Masking, Objective, TeacherObjective, TokenSelector
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import SoftKD
from vitdistill.methods.maskedkd import RandomPatches
from vitdistill.methods.masking import RandomMasking
from vitdistill.vit.needs import Needs
from vitdistill.vit.output import QKV, ViTOutput
from vitdistill.vit.walk import run_vit

NUM_CLASSES, NUM_IMAGES, GRID = 5, 6, (4, 4)
OBJECTIVES = [name for name in METHODS if issubclass(method_class(name), Objective)]
SMALL = {"mae": {"decoder_dim": 24, "decoder_depth": 2, "decoder_num_heads": 2}}
"""Settings that make a method as small as the networks."""
SELECTORS = [name for name in METHODS if issubclass(method_class(name), TokenSelector)]
MASKINGS = [name for name in METHODS if issubclass(method_class(name), Masking)]
SEEN = ["whole", "kept", "masked"]
"""How much student and teacher see: all; the teacher half of it; both half of it."""


def vit(
    seed: int, dim: int, depth: int, name: str = "vit_tiny_patch16_224", **args: Any
) -> nn.Module:
    return small_vits.vit(seed, name, std=0.2, embed_dim=dim, depth=depth, **args)


class Case:
    """A student, a teacher, a batch, and the method between them.

    ``shapes``: two plain ViTs ``alike``; ``unlike``: a student with two prefix tokens on 2 x 2
    patches, and a teacher with three on 4 x 4, of other width, depth and heads; or two of
    another of the families that are walked (`small_vits.WALKED`).
    """

    def __init__(
        self, name: str, mixed: bool = False, seen: str = "whole", shapes: str = "alike"
    ) -> None:
        self.method: Any = method_class(name)(**SMALL.get(name, {}))
        is_objective = isinstance(self.method, Objective)
        if is_objective and self.method.needs_masking:
            seen = "masked"
        masking = self.method if isinstance(self.method, Masking) else None
        if seen == "masked" and masking is None:
            masking = RandomMasking(mask_rate=0.5)
        reads_logits = not is_objective or self.method.teacher_needs(TEACHER).logits
        classes = 5 if reads_logits else 0
        if shapes == "unlike":  # under a mask both have to have the same patches
            grid = {} if masking else {"patch_size": 8}
            self.student = vit(0, 24, 4, DISTILLED, **grid)
            self.model = vit(1, 36, 5, reg_tokens=2, num_heads=3, num_classes=classes)
        elif shapes in WALKED:
            kind, args = WALKED[shapes]
            self.student = vit(0, 24, 4, kind, **args)
            self.model = vit(1, 36, 5, kind, num_heads=3, num_classes=classes, **args)
        else:
            self.student, self.model = vit(0, 24, 4), vit(1, 36, 5, num_classes=classes)
        self.teacher = teacher_of(self.model)
        objectives = {"it": self.method} if is_objective else {"kd": SoftKD()}
        if shapes == "unlike":
            objectives |= {"both": CrossEntropy(head="all")}
        taught = any(isinstance(o, TeacherObjective) for o in objectives.values())
        self.teachers = {"teacher": self.teacher} if taught else {}
        selector = self.method if isinstance(self.method, TokenSelector) else None
        if seen == "kept" and taught and selector is None:
            selector = RandomPatches(keep_rate=0.5)
        student, networks = network(self.student, "student"), {"teacher": self.teacher.network}
        self.plan: Plan = make_plan(
            student, networks if taught else {}, objectives, selector, masking
        )
        self._keep: Tensor | None = None
        self.module = Distillation(self.student, self.plan)
        ids = torch.arange(NUM_IMAGES)
        self.batch = Batch(torch.randn(NUM_IMAGES, 3, 16, 16), ids % NUM_CLASSES, ids, ids * 0, 0)
        if mixed:
            self.batch.mixed_labels = self.batch.labels.flip(0)
            self.batch.lam = torch.linspace(0.1, 0.9, NUM_IMAGES)

    @property
    def adapter(self) -> nn.Module | None:
        return dict(self.module.adapters.items()).get("it")

    @property
    def keep(self) -> Tensor | None:
        """The patches that are left of a masking: the same tensor at every call."""
        if self._keep is None and self.plan.masking is not None:
            order = self.module.mask(self.batch)
            self._keep = order[:, : self.plan.student_keep]
        return self._keep

    def student_output(self, needs: Needs | None = None) -> ViTOutput:
        needs = self.plan.student_needs if needs is None else needs
        return run_vit(self.student, self.batch.images, needs, self.keep)

    def teacher_output(self, needs: Needs | None = None) -> ViTOutput | None:
        if not self.teachers:
            return None
        needs = self.plan.live["teacher"] if needs is None else needs
        return self.teacher(self.batch.images, needs, self.keep)

    def loss(
        self, student: ViTOutput, teacher: ViTOutput | None, batch: Batch | None = None
    ) -> Tensor:
        torch.manual_seed(5)  # a method that draws random numbers draws the same ones
        return self.method.loss(student, teacher, batch or self.batch, self.adapter)

    def loss_of(self, images: Tensor, student: ViTOutput, teacher: ViTOutput | None) -> Tensor:
        """Of these images alone, in this order."""
        outputs = permuted(student, images), permuted(teacher, images)
        return self.loss(*outputs, permuted_batch(self.batch, images))

    def select(self, student: ViTOutput, teacher: ViTOutput | None, noise: Tensor | None) -> Tensor:
        return self.method.select(GRID, 5, student, teacher, noise)

    def noise(self) -> Tensor | None:
        noise = torch.rand(NUM_IMAGES, 16, generator=torch.Generator().manual_seed(2))
        return noise if self.method.reads_noise else None


def case_if_possible(
    name: str, mixed: bool = False, seen: str = "whole", shapes: str = "alike"
) -> Case:
    """The case; with everything in sight where the objective says that it needs every patch, and
    the plan then refuses a masking.
    """
    method = method_class(name)()
    if seen == "masked" and isinstance(method, Objective) and method.needs_every_patch:
        with pytest.raises(ConfigError, match="reads every patch of the student"):
            Case(name, mixed, seen, shapes)
        seen = "whole"
    return Case(name, mixed, seen, shapes)


def everything(depth: int) -> Needs:
    blocks = frozenset(range(depth))
    return Needs(logits=True, hidden=blocks, attention=blocks, qkv=blocks, features=True)


def changed(output: ViTOutput, change: Callable[[str, int, Tensor], Tensor]) -> ViTOutput:
    """``output`` with every recorded tensor changed: ``change(kind, block, tensor)``."""
    single = {
        kind: None if value is None else change(kind, 0, value)
        for kind in ("logits", "head_logits", "features")
        for value in (getattr(output, kind),)
    }
    blocks = {
        kind: {i: change(kind, i, value) for i, value in getattr(output, kind).items()}
        for kind in ("hidden", "attention")
    }
    qkv = {i: QKV(*(change("qkv", i, t) for t in value)) for i, value in output.qkv.items()}
    return replace(output, **single, **blocks, qkv=qkv)


def spoilt(output: ViTOutput, is_spoilt: Callable[[str, int], bool]) -> ViTOutput:
    """``output`` with NaN for what ``is_spoilt(kind, block)`` says."""
    return changed(output, lambda kind, i, t: t * torch.nan if is_spoilt(kind, i) else t)


def poisoned(full: ViTOutput, declared: Needs) -> ViTOutput:
    """``full`` with NaN for everything that is not declared."""
    needs = declared.resolve(full.depth)

    def unread(kind: str, block: int) -> bool:
        asked = getattr(needs, kind, True)  # the heads' logits come with the logits
        return not (asked if isinstance(asked, bool) else block in asked)

    return spoilt(full, unread)


def spoilt_one_by_one(output: ViTOutput) -> list[ViTOutput]:
    """Copies of ``output`` with another one of its recorded tensors NaN in each."""
    places: set[tuple[str, int]] = set()
    changed(output, lambda kind, i, t: places.add((kind, i)) or t)
    places -= {("head_logits", 0)}
    return [spoilt(output, lambda kind, i, at=at: (kind, i) == at) for at in sorted(places)]


def permuted(output: ViTOutput | None, order: Tensor) -> ViTOutput | None:
    if output is None:
        return None
    keep = None if output.keep is None else output.keep[order]
    tensors = changed(replace(output, keep=None), lambda _, __, t: t[order])
    return replace(tensors, keep=keep)


def permuted_batch(batch: Batch, order: Tensor) -> Batch:
    names = ("images", "labels", "ids", "views", "mixed_labels", "lam")
    tensors = {name: getattr(batch, name) for name in names}
    return replace(batch, **{name: t[order] for name, t in tensors.items() if t is not None})
