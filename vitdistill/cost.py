"""What a plan costs before it runs: FLOPs counted on the very code that will run, and the paper's own accounting beside it."""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .method import Network
from .plan import Plan, describe_needs
from .vit import Needs, run_vit

IMAGENET_TRAIN_IMAGES = 1_281_167


def vit_macs(network: Network, num_keep: int | None = None, mlp_ratio: float = 4.0) -> int:
    """Multiply-accumulates of one plain ViT forward pass, as the MaskedKD paper counts them.

    Every patch is embedded, every block runs on K kept patches and one class token, whole:
    ``N (3 p^2) D + L ((4 + 2 r) n D^2 + 2 n^2 D) + D C`` with ``n = K + 1`` and r the MLP ratio.

    Source: reproduces the teacher cost column of arXiv 2302.10494 (in units of 10^15 MACs, over images x epochs) within 0.3 %.
    """
    n = (network.num_patches if num_keep is None else num_keep) + 1
    d = network.dim
    embed = network.num_patches * 3 * network.patch_size[0] * network.patch_size[1] * d
    block = (4 + 2 * mlp_ratio) * n * d**2 + 2 * n**2 * d
    return int(embed + network.depth * block + d * network.num_classes)


def forward_flops(model: nn.Module, image_size: tuple[int, int], needs: Needs | None = None, num_keep: int | None = None) -> int:
    """FLOPs of one recorded forward pass on one image (a multiply-accumulate is 2), counted with `FlopCounterMode` on the meta device.

    ``needs=None`` counts the model's own forward.
    """
    return _count(model, image_size, needs, num_keep, backward=False)


def training_flops(model: nn.Module, image_size: tuple[int, int], needs: Needs | None = None) -> int:
    """FLOPs of one forward and backward pass on one image."""
    return _count(model, image_size, needs, None, backward=True)


def _count(model: nn.Module, image_size: tuple[int, int], needs: Needs | None, num_keep: int | None, backward: bool) -> int:
    model = _on_meta(model)
    images = torch.empty(2, 3, *image_size, device="meta")  # two: some batch norms refuse to train on one value a channel
    keep = None if num_keep is None else torch.zeros(2, num_keep, dtype=torch.int64, device="meta")
    # With gradients in either case: without, torch's module tracker fails on a network that hands a parameter to a block (CaiT).
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        if needs is None:
            outputs: list[Tensor] = [model(images)]
        else:
            out = run_vit(model, images, needs, keep)
            outputs = [t for t in (out.logits, *out.hidden.values()) if t is not None]
        if backward:
            torch.autograd.backward([t.sum() for t in outputs])
    return counter.get_total_flops() // 2


def _on_meta(model: nn.Module) -> nn.Module:
    """The same architecture without weights, so that counting costs neither memory nor time."""
    import copy

    if all(p.is_meta for p in model.parameters()):
        return model
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        fake = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    return copy.deepcopy(model, memo)


@dataclass(frozen=True)
class Cost:
    """FLOPs an image of one training step (a multiply-accumulate is 2).

    Attributes:
        student: forward and backward of this plan; ``student_plain``: of the student trained alone by its own forward.
        teachers: forward of this plan, guides included; ``teachers_plain``: of the whole teacher on the whole image.
    """

    student: int
    student_plain: int
    teachers: dict[str, int]
    teachers_plain: dict[str, int]

    @property
    def step(self) -> int:
        """Everything this plan computes for one training image."""
        return self.student + sum(self.teachers.values())

    @property
    def plain_kd(self) -> int:
        """What plain distillation from the same teachers computes for one training image."""
        return self.student_plain + sum(self.teachers_plain.values())


def cost_of(plan: Plan, student: nn.Module, teachers: Mapping[str, nn.Module]) -> Cost:
    """Count what ``plan`` computes an image; models may live on the meta device."""
    live, plain = {}, {}
    for name, model in teachers.items():
        size = plan.teachers[name].image_size
        plain[name] = forward_flops(model, size)
        live[name] = forward_flops(model, size, plan.live[name], plan.num_keep[name])
        if name in plan.guides:
            live[name] += forward_flops(model, size, plan.guides[name])
    was_training = student.training
    student.train()
    cost = Cost(
        student=training_flops(student, plan.student.image_size, plan.student_needs),
        student_plain=training_flops(student, plan.student.image_size),
        teachers=live,
        teachers_plain=plain,
    )
    student.train(was_training)
    return cost


def explain(plan: Plan, cost: Cost, num_images: int, epochs: int) -> str:
    """The plan and its cost as plain text: what each network computes, FLOPs an image, and the whole run's total.

    Args:
        num_images: training images an epoch.
        epochs: of the run.
    """
    student = plan.student
    against = "plain distillation" if plan.teachers else "plain training"
    computes = {"student": describe_needs(student, plan.student_needs, None)}
    rows: list[tuple[str, ...]] = [
        ("an image", "parameters", "FLOPs", f"against {against}"),
        (
            "student, trained",
            flops(student.num_parameters, ""),
            flops(cost.student),
            f"{cost.student / cost.student_plain:.0%} of {flops(cost.student_plain)}",
        ),
    ]
    for name, teacher in plan.teachers.items():
        computes[name] = describe_needs(teacher, plan.live[name], plan.num_keep[name])
        if name in plan.guides:
            computes[name] += "; and once more on the whole image, to choose its patches"
        rows.append(
            (
                name,
                flops(teacher.num_parameters, ""),
                flops(cost.teachers[name]),
                f"{cost.teachers[name] / cost.teachers_plain[name]:.0%} of {flops(cost.teachers_plain[name])}",
            )
        )
    if plan.teachers:
        rows.append(("together", "", flops(cost.step), f"{cost.step / cost.plain_kd:.0%} of {flops(cost.plain_kd)}"))
    lines = ["What each network computes", *table(rows), ""]
    networks = {"student": student, **plan.teachers}
    for name, text in computes.items():
        lines += _wrapped(f"{name}, {networks[name].architecture}: {text}")
    images = num_images * epochs
    lines += ["", f"The whole run, {num_images:,} images x {epochs} epochs (1 multiply-accumulate = 2 FLOPs)"]
    total: list[tuple[str, ...]] = [
        ("", "this plan", against),
        ("student", flops(cost.student * images), flops(cost.student_plain * images)),
    ]
    for name in plan.teachers:
        total.append((name, flops(cost.teachers[name] * images), flops(cost.teachers_plain[name] * images)))
    if plan.teachers:
        total.append(("together", flops(cost.step * images), flops(cost.plain_kd * images)))
    lines += table(total)
    for name, teacher in plan.teachers.items():
        if teacher.walks:
            masked, whole = vit_macs(teacher, plan.num_keep[name]) * images, vit_macs(teacher) * images
            lines += ["", f"The {name} as the MaskedKD paper counts it (blocks whole, all patches embedded)"]
            saved = f" against {flops(whole, 'MACs')} for plain distillation ({masked / whole - 1:+.0%})" if masked < whole else ""
            lines.append(f"  {flops(masked, 'MACs')}{saved}")
    lines += ["", "What every loss weight multiplies"]
    for name, objective in plan.objectives.items():
        lines += _wrapped(f"{objective.weight:g} x {name}: {objective.formula}")
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 78, initial_indent="  ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def flops(count: int | float, unit: str = "FLOPs") -> str:
    """A count with its unit, at least three digits: ``2.51 GFLOPs``, ``1,282 PMACs``."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if count >= 10**power:
            value = count / 10**power
            digits = f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"
            return f"{digits} {prefix}{unit}"
    return f"{count:.0f} {unit}"


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Aligned columns, two spaces apart, the first row underlined."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    text = ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [text[0], "  " + "-" * (sum(widths) + 2 * (len(widths) - 1)), *text[1:]]
