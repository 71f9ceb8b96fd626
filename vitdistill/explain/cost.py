"""What a plan costs before it runs: FLOPs counted on the very code that will run, and the paper's
own accounting beside it.
"""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..data.batch import Batch
from ..distill.plan import Plan
from ..labels.reader import StoredAnswer, blank_targets
from ..messages import format_bytes, format_count, format_table, plural
from ..methods.base import TeacherObjective
from ..vit.flops import _on_meta, blank_keep, forward_flops, training_flops
from ..vit.needs import describe_needs
from ..vit.network import Network
from ..vit.output import ViTOutput
from ..vit.walk import run_vit

IMAGENET_TRAIN_IMAGES = 1_281_167


def vit_macs(network: Network, num_keep: int | None = None, mlp_ratio: float = 4.0) -> int:
    """Multiply-accumulates of one plain ViT forward pass, as the MaskedKD paper counts them.

    Every patch is embedded, every block runs on K kept patches and one class token, whole:
    ``N (3 p^2) D + L ((4 + 2 r) n D^2 + 2 n^2 D) + D C`` with ``n = K + 1`` and r the MLP ratio.

    Source: reproduces the teacher cost column of arXiv 2302.10494 (in units of 10^15 MACs, over
    images x epochs) within 0.3 %.
    """
    n = (network.num_patches if num_keep is None else num_keep) + 1
    d = network.dim
    embed = network.num_patches * 3 * network.patch_size[0] * network.patch_size[1] * d
    block = (4 + 2 * mlp_ratio) * n * d**2 + 2 * n**2 * d
    return int(embed + network.depth * block + d * network.num_classes)


@dataclass(frozen=True)
class Cost:
    """FLOPs an image of one training step (a multiply-accumulate is 2), and what training keeps in
    memory.

    Attributes:
        student: forward and backward of this plan; ``student_plain``: of the student trained alone
            by its own forward.
        teachers: forward of this plan, guides included; ``teachers_plain``: of the whole teacher on
            the whole image.
        objectives: forward and backward of what an objective computes itself (projections,
            generators, products of features).
        adapters: parameters of each objective's own trainable part, where it has one.
        activations: bytes an image that are kept for the backward pass, in float32;
            ``activations_plain``: of the student alone.
        stems: what of ``student`` its patch embedding is, where that is more than a tenth of its
            forward pass; else 0.
    """

    student: int
    student_plain: int
    teachers: dict[str, int]
    teachers_plain: dict[str, int]
    objectives: dict[str, int]
    adapters: dict[str, int]
    activations: int
    activations_plain: int
    stems: int = 0

    @property
    def step(self) -> int:
        """Everything this plan computes for one training image."""
        return self.student + sum(self.teachers.values()) + sum(self.objectives.values())

    @property
    def plain_kd(self) -> int:
        """What plain distillation from the same teachers computes for one training image."""
        return self.student_plain + sum(self.teachers_plain.values())


def cost_of(
    plan: Plan, student: nn.Module, teachers: Mapping[str, nn.Module], batch_size: int = 64
) -> Cost:
    """Count what ``plan`` computes an image; models may live on the meta device. A teacher whose
    answers are stored costs nothing.

    ``batch_size``: images of a micro-batch, at least 2. What an objective computes once for all of
    them is shared among them, and what it computes between any two of them grows with it.
    """
    batch_size = max(batch_size, 2)  # some batch norms refuse to train on one value a channel
    live, plain = {}, {}
    for name, model in teachers.items():
        if name in plan.stored:
            continue
        size = plan.teachers[name].image_size
        plain[name] = forward_flops(model, size)
        live[name] = forward_flops(model, size, plan.live[name], plan.num_keep[name])
        if name in plan.guides:
            live[name] += forward_flops(model, size, plan.guides[name])
    for name in plan.stored:
        live[name], plain[name] = 0, plan.teachers[name].flops
    was_training = student.training
    student.train()
    objectives, adapters, total, kept = _count_objectives(plan, student, teachers, batch_size)
    kept_plain = _Kept()
    with kept_plain:
        plain_total = training_flops(student, plan.student.image_size)
    cost = Cost(
        student=total - sum(objectives.values()),
        student_plain=plain_total,
        teachers=live,
        teachers_plain=plain,
        objectives=objectives,
        adapters=adapters,
        activations=kept,
        activations_plain=kept_plain.bytes // 2,
        stems=_count_stems(plan, student),
    )
    student.train(was_training)
    return cost


def _count_stems(plan: Plan, student: nn.Module) -> int:
    """FLOPs an image of the patch embedding, forward and backward, where they are worth a line of
    their own; else 0.
    """
    embed, size = getattr(student, "patch_embed", None), plan.student.image_size
    if (
        not plan.student.walks
        or embed is None
        or (type(embed) is PatchEmbed and plan.student_keep is not None)
    ):
        return 0
    return (
        training_flops(embed, size)
        if forward_flops(embed, size) > 0.1 * forward_flops(student, size)
        else 0
    )


def _count_objectives(
    plan: Plan, student: nn.Module, teachers: Mapping[str, nn.Module], batch_size: int
) -> tuple[dict[str, int], dict[str, int], int, int]:
    """FLOPs an image of each objective, parameters of each adapter, and FLOPs and kept bytes of the
    student with all of them.
    """
    student = _on_meta(student)
    with torch.device("meta"):
        images, ids = (
            torch.empty(batch_size, 3, *plan.student.image_size),
            torch.zeros(batch_size, dtype=torch.int64),
        )
        batch = Batch(images, ids, ids, ids, 0)
        adapters = {
            name: objective.adapter(
                plan.student,
                (
                    plan.teachers[objective.teacher]
                    if isinstance(objective, TeacherObjective)
                    else None
                ),
            )
            for name, objective in plan.objectives.items()
        }
        seen = blank_keep(plan.student_keep, batch_size)
        answers: dict[str, ViTOutput | StoredAnswer] = {
            name: _answer(plan, name, model, seen, batch_size)
            for name, model in teachers.items()
            if name in plan.live
        }
    for name, layout in plan.labels.items():
        answers[name] = StoredAnswer(blank_targets(layout, batch_size, "meta"), plan.teachers[name])
    counts, kept = {}, _Kept()
    with torch.enable_grad():
        with kept, FlopCounterMode(display=False) as counter:
            output = run_vit(student, images, plan.student_needs, seen)
            torch.stack(_losses(plan, output, answers, batch, adapters)).sum().backward()
        total = counter.get_total_flops() // batch_size
        for name, objective in plan.objectives.items():
            alone = replace(plan, objectives={name: objective})
            with FlopCounterMode(display=False) as counter:
                (loss,) = _losses(alone, _cut(output), answers, batch, adapters)
                loss.backward()
            counts[name] = counter.get_total_flops() // batch_size
    parameters = {
        name: sum(p.numel() for p in adapter.parameters())
        for name, adapter in adapters.items()
        if adapter is not None
    }
    return counts, parameters, total, kept.bytes // batch_size


def _answer(
    plan: Plan, name: str, model: nn.Module, seen: Tensor | None, batch_size: int
) -> ViTOutput:
    """What a teacher would record, on the meta device, in the number of classes it answers for;
    ``seen`` are the student's patches.
    """
    network, keep = plan.teachers[name], blank_keep(plan.num_keep[name], batch_size)
    images = torch.empty(batch_size, 3, *network.image_size, device="meta")
    with torch.no_grad():
        answer = run_vit(_on_meta(model), images, plan.live[name], keep)
    answer = answer if seen is None else answer.first_patches(seen)
    if answer.logits is None:
        return answer
    return replace(answer, logits=torch.empty(batch_size, network.num_classes, device="meta"))


def _losses(
    plan: Plan,
    student: ViTOutput,
    answers: Mapping[str, ViTOutput | StoredAnswer],
    batch: Batch,
    adapters: Mapping[str, nn.Module | None],
) -> list[Tensor]:
    losses = []
    for name, objective in plan.objectives.items():
        teacher = answers[objective.teacher] if isinstance(objective, TeacherObjective) else None
        if isinstance(teacher, StoredAnswer):
            teacher = teacher.at(plan.temperatures.get(name))
        losses.append(objective.loss(student, teacher, batch, adapters.get(name)))
    return losses


def _cut(value: Any) -> Any:
    """A recorded output whose tensors are leaves that want gradients: what is computed behind them
    is not counted.
    """
    if isinstance(value, Tensor):
        return value.detach().requires_grad_() if value.is_floating_point() else value
    if isinstance(value, ViTOutput):
        return replace(value, **{f.name: _cut(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, dict):
        return {key: _cut(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_cut, value))
    return value


class _Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps for the backward pass, weights left out, each storage
    once.
    """

    def __init__(self) -> None:
        self.storages: dict[int, Tensor] = {}
        super().__init__(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if not isinstance(base, nn.Parameter):
            self.storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    @property
    def bytes(self) -> int:
        """Of all of them together."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.storages.values())


def explain(plan: Plan, cost: Cost, num_images: int, epochs: int) -> str:
    """The plan and its cost as plain text: what each network computes, FLOPs an image, and the
    whole run's total.

    Args:
        num_images: training images an epoch.
        epochs: of the run.
    """
    student = plan.student
    against = "plain distillation" if plan.teachers else "plain training"
    computes = {"student": describe_needs(student, plan.student_needs, plan.student_keep)}
    rows: list[tuple[str, ...]] = [
        ("an image", "parameters", "FLOPs", f"against {against}"),
        (
            "student, trained",
            format_count(student.num_parameters, ""),
            format_count(cost.student),
            f"{cost.student / cost.student_plain:.0%} of {format_count(cost.student_plain)}",
        ),
    ]
    if cost.stems:
        rows.append(
            (
                "of which the stems (patch embedding)",
                "",
                format_count(cost.stems),
                f"({cost.stems / cost.student:.0%} of the student)",
            )
        )
    for name, teacher in plan.teachers.items():
        if name in plan.stored:
            computes[name] = (
                f"does not run; its labels are read, {format_bytes(plan.labels[name].record_bytes)}"
                " an image"
            )
            of = f"0% of {format_count(teacher.flops)}" if teacher.flops else "stored"
            rows.append((name, format_count(teacher.num_parameters, ""), format_count(0), of))
            continue
        computes[name] = describe_needs(teacher, plan.live[name], plan.num_keep[name])
        if name in plan.guides:
            computes[name] += "; and once more on the whole image, to choose its patches"
        rows.append(
            (
                name,
                format_count(teacher.num_parameters, ""),
                format_count(cost.teachers[name]),
                (
                    f"{cost.teachers[name] / cost.teachers_plain[name]:.0%} of"
                    f" {format_count(cost.teachers_plain[name])}"
                ),
            )
        )
    for name, count in cost.objectives.items():
        if count or name in cost.adapters:
            added = cost.adapters.get(name, 0)
            rows.append(
                (
                    f"{name}, its own part",
                    format_count(added, "") if added else "",
                    format_count(count),
                    "",
                )
            )
    if plan.teachers:
        rows.append(
            (
                "together",
                "",
                format_count(cost.step),
                f"{cost.step / cost.plain_kd:.0%} of {format_count(cost.plain_kd)}",
            )
        )
    lines = ["What each network computes", *format_table(rows), ""]
    networks = {"student": student, **plan.teachers}
    for name, text in computes.items():
        lines += _wrapped(f"{name}, {networks[name].architecture}: {text}")
    extra = sum(cost.adapters.values())
    memory = (
        f"  kept for the backward pass: {format_bytes(cost.activations)} an image in float32; the"
        " student alone keeps "
    )
    lines += ["", "Training memory", memory + format_bytes(cost.activations_plain)]
    trained = f"{format_count(student.num_parameters + extra, '').strip()} trained parameters"
    lines.append(
        "  weights, gradients and AdamW's two moments:"
        f" {format_bytes(16 * (student.num_parameters + extra))} ({trained})"
    )
    images = num_images * epochs
    lines += [
        "",
        (
            f"The whole run, {plural(num_images, 'image')} x {plural(epochs, 'epoch')} (1"
            " multiply-accumulate = 2 FLOPs)"
        ),
    ]
    total: list[tuple[str, ...]] = [
        ("", "this plan", against),
        ("student", format_count(cost.student * images), format_count(cost.student_plain * images)),
    ]
    for name in plan.teachers:
        total.append(
            (
                name,
                format_count(cost.teachers[name] * images),
                format_count(cost.teachers_plain[name] * images),
            )
        )
    own = sum(cost.objectives.values())
    if own:
        total.append(("objectives", format_count(own * images), ""))
    if plan.teachers:
        total.append(
            ("together", format_count(cost.step * images), format_count(cost.plain_kd * images))
        )
    lines += format_table(total)
    for name, teacher in plan.teachers.items():
        if name in plan.live and teacher.walks and plan.live[name].logits:
            masked, whole = (
                vit_macs(teacher, plan.num_keep[name]) * images,
                vit_macs(teacher) * images,
            )
            lines += [
                "",
                f"The {name} as the MaskedKD paper counts it (blocks whole, all patches embedded)",
            ]
            saved = (
                f" against {format_count(whole, 'MACs')} for plain distillation"
                f" ({masked / whole - 1:+.0%})"
                if masked < whole
                else ""
            )
            lines.append(f"  {format_count(masked, 'MACs')}{saved}")
    lines += ["", "What every loss weight multiplies"]
    for name, objective in plan.objectives.items():
        note = f" ({plan.notes[name]})" if name in plan.notes else ""
        lines += _wrapped(f"{objective.weight:g} x {name}: {objective.formula}{note}")
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text,
        78,
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
