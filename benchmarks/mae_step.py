"""What a DMAE step costs, against that of the authors' code, which runs the whole teacher and its
decoder and discards the surplus.

    python benchmarks/mae_step.py                  # ViT-S from ViT-B, about half an hour
    python benchmarks/mae_step.py large --write    # ViT-B from ViT-L; keep the table in results/

The optimizer's work is the same in every step and does not grow with the batch: in a batch of four
it hides a part of what is saved.

The steps of one mask rate take turns in one process, in another order every round, on the same
images, masks and weights, and must give the same losses. A step is compared with the authors' of
its own round. The clock is the CPU time of this process. Random images and weights, float32, one
thread. Memory is the peak of what torch allocates in a step, beyond the weights.

Freed memory is kept, as on a GPU. Otherwise glibc returns every large tensor to the system and the
next one is paid for page by page: 14 % of the authors' step in batches of 64, nothing in a step of
small tensors.
"""

import ctypes
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import step_cost
import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from vitdistill.data.batch import Batch
from vitdistill.data.model_input import input_spec_of
from vitdistill.distill.plan import make_plan
from vitdistill.distill.step import Distillation
from vitdistill.distill.teacher import Teacher
from vitdistill.errors import ConfigError
from vitdistill.methods.dmae import DMAE, DMAEAdapter, alignment_loss
from vitdistill.methods.mae import PixelReconstruction
from vitdistill.methods.masking import RandomMasking
from vitdistill.models.mae import MAEDecoder, init_mae, pixel_targets
from vitdistill.recipes.config import OptimConfig
from vitdistill.runs.optim import gradient_norm, make_optimizer
from vitdistill.vit.families import describe_network
from vitdistill.vit.patches import gather_patches

RATES = (0.75, 0.9, 0.95, 0.98)
PAIRS = {
    "small": ("deit_small_patch16_224", "deit_base_patch16_224"),
    "large": ("deit_base_patch16_224", "vit_large_patch16_224"),
}
SIZE = (224, 224)


def build(name: str, seed: int) -> nn.Module:
    """A ViT without a classifier, with MAE's random weights."""
    torch.manual_seed(seed)
    model: Any = timm.create_model(name, num_classes=0)
    init_mae(model)
    return model


class WholeTeacher(nn.Module):
    """What the authors' code does with a batch: every patch is embedded, all of both networks runs,
    the teacher's decoder too.

    The student half is the same decoder as ours; the arithmetic is PyTorch's own, block by block.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        decoder: MAEDecoder,
        teacher_decoder: MAEDecoder,
        align: nn.Module,
    ) -> None:
        super().__init__()
        self.student, self.decoder, self.align = student, decoder, align
        self.other = [teacher, teacher_decoder]  # in a list: not trained

    def walk(self, model: Any, images: Tensor, keep: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """Hidden states after ``block``, and the features after the final norm, of the kept
        patches.
        """
        patches = model.patch_embed(images) + model.pos_embed[:, 1:]
        first = (model.cls_token + model.pos_embed[:, :1]).expand(len(images), -1, -1)
        tokens = torch.cat([first, gather_patches(patches, keep)], dim=1)
        hidden = tokens
        for i, layer in enumerate(model.blocks):
            tokens = layer(tokens)
            hidden = tokens if i == block else hidden
        return hidden, model.norm(tokens)

    def forward(
        self, images: Tensor, keep: Tensor, blocks: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Reconstruction and alignment loss."""
        teacher, teacher_decoder = self.other
        with torch.no_grad():
            target, features = self.walk(teacher, images, keep, blocks[1])
            teacher_decoder(features, keep, 1)
        hidden, features = self.walk(self.student, images, keep, blocks[0])
        prediction = self.decoder(features, keep, 1)
        mask = prediction.new_ones(prediction.shape[:2]).scatter(1, keep, 0.0)
        pixels = pixel_targets(images, self.decoder.patch_size, norm_pix=False)
        error = (prediction.float() - pixels).square().mean(-1)
        return (error * mask).sum() / mask.sum(), alignment_loss(self.align(hidden), target)


@dataclass
class Made:
    """A step to be measured, and its losses now."""

    name: str
    step: Callable[[], None]
    losses: Callable[[], tuple[float, ...]]


def make_steps(pair: str, rate: float, batch_size: int) -> list[Made]:
    """The authors' step first, then ours, then ours with a decoder of two blocks."""
    names = PAIRS[pair]
    teacher_model = build(names[1], 2).eval().requires_grad_(False)
    network = describe_network(teacher_model, "teacher", names[1], SIZE)
    spec = input_spec_of(teacher_model)
    teacher = Teacher(teacher_model, network, spec, spec)
    torch.manual_seed(0)
    ids = torch.arange(batch_size)
    batch = Batch(torch.randn(batch_size, 3, *SIZE), ids * 0, ids, ids * 0, 0)
    made = []
    for title, depth in (("the authors' step", 8), ("ours", 8), ("ours, decoder of 2 blocks", 2)):
        student = build(names[0], 1)
        plan = make_plan(
            describe_network(student, "student", names[0], SIZE),
            {"teacher": network},
            {"mae": PixelReconstruction(decoder_depth=depth), "dmae": DMAE()},
            masking=RandomMasking(mask_rate=rate),
        )
        torch.manual_seed(3)
        ours = Distillation(student, plan)
        if title == "the authors' step":
            made.append(_authors(ours, teacher_model, batch))
        else:
            made.append(_ours(title, ours, teacher, batch))
    return made


def _ours(title: str, module: Distillation, teacher: Teacher, batch: Batch) -> Made:
    @torch.no_grad()
    def losses() -> tuple[float, ...]:
        found = module(batch, {"teacher": teacher})
        return found["mae"].item(), found["dmae"].item()

    return Made(title, step_cost.our_step(module, {"teacher": teacher}, batch), losses)


def _authors(module: Distillation, teacher: nn.Module, batch: Batch) -> Made:
    decoder, adapter = module.adapters["mae"], module.adapters["dmae"]
    assert isinstance(decoder, MAEDecoder) and isinstance(adapter, DMAEAdapter)
    network = module.plan.teachers["teacher"]
    torch.manual_seed(4)
    other = MAEDecoder(network.dim, network.grid, network.patch_size)
    whole = WholeTeacher(
        module.student, teacher, decoder, other.requires_grad_(False), adapter.projections[0]
    )
    order = module.mask(batch)
    assert order is not None
    keep = order[:, : module.plan.student_keep]
    (pair,) = module.plan.objectives["dmae"].pairs(module.plan.student.depth, network.depth)  # type: ignore[attr-defined]
    # The same optimizer as ours: it is not what is compared.
    optimizer = make_optimizer(
        module,
        OptimConfig(
            lr=step_cost.LR, weight_decay=step_cost.WEIGHT_DECAY, sched="none", warmup_epochs=0
        ),
    )

    def step() -> None:
        optimizer.zero_grad()
        reconstruction, distance = whole(batch.images, keep, pair)
        loss = reconstruction + distance
        loss.backward()
        norm = gradient_norm(module)
        if not bool(loss.isfinite() & norm.isfinite()):
            raise AssertionError("the benchmark diverged")
        optimizer.step()

    @torch.no_grad()
    def losses() -> tuple[float, ...]:
        reconstruction, distance = whole(batch.images, keep, pair)
        return reconstruction.item(), distance.item()

    return Made("the authors' step", step, losses)


def flops_of(step: Callable[[], None]) -> int:
    """What torch counts in a step: matrix products, convolutions and attention, whose backward pass
    computes its scores once more.
    """
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for what is allocated next (M_MMAP_MAX, M_TRIM_THRESHOLD);
    other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)
        mallopt(-1, -1)


def peak_memory(run: Callable[[], None]) -> int:
    """The most that torch has allocated at once within ``run``, bytes, beyond what there was
    before.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


def rows(
    rate: float, steps: list[step_cost.Step], memory: list[int], batch_size: int
) -> Iterator[str]:
    """Markdown rows of one mask rate."""
    authors = steps[0]
    for step, peak in zip(steps, memory, strict=True):
        relative = [its / mine for mine, its in zip(step.seconds, authors.seconds, strict=True)]
        low, median, high = statistics.quantiles(relative, n=4, method="inclusive")
        expected = authors.flops / step.flops
        cells = (
            f"{rate:.0%}",
            step.name,
            f"{1e3 * statistics.median(step.seconds) / batch_size:.0f}",
            f"**{median:.2f}**",
            f"{low:.2f} .. {high:.2f}",
            f"{expected:.2f}",
            f"{median / expected:.2f}",
            f"{step.flops / 1e9:.1f}",
            f"{peak / batch_size / 1e6:.0f}",
        )
        yield f"| {' | '.join(cells)} |"


def main(
    pair: Literal["small", "large"] = "small",
    /,
    rounds: int = 11,
    batch_size: int = 16,
    write: bool = False,
    rates: tuple[float, ...] = RATES,
) -> None:
    """Measure DMAE steps against the authors'.

    Args:
        pair: small (ViT-S from ViT-B) or large (ViT-B from ViT-L), 224 x 224, decoder 512 wide.
        rounds: of all steps, at least 5.
        batch_size: images.
        write: also write the table to
            benchmarks/results/mae_step_<pair>_<cpu>_<instructions>_<date>.md.
        rates: fractions of the patches that are hidden.
    """
    if rounds < 5:
        raise ConfigError(f"--rounds is {rounds}: medians need at least 5")
    if batch_size < 1:
        raise ConfigError(f"--batch-size is {batch_size}: it has to be at least 1")
    torch.set_num_threads(1)
    keep_freed_memory()
    head = (
        "| masked | step | ms / image | times faster | quartiles | by FLOPs | measured / FLOPs |"
        " GFLOPs / image | peak MB / image |"
    )
    lines = [head, "|---|---|---:|---:|---:|---:|---:|---:|---:|"]
    for rate in rates:
        made = make_steps(pair, rate, batch_size)
        first, ours = made[0].losses(), made[1].losses()
        if any(abs(a - b) > 1e-5 * abs(a) for a, b in zip(first, ours, strict=True)):
            raise AssertionError(f"the losses differ: {first} and {ours}")
        memory = [peak_memory(one.step) for one in made]
        steps = [
            step_cost.Step(one.name, one.step, flops_of(one.step) // batch_size) for one in made
        ]
        step_cost.measure(steps, rounds)
        lines += rows(rate, steps, memory, batch_size)
        print("\n".join(lines[-3:]), flush=True)
    student, teacher = PAIRS[pair]
    note = (
        f"Batch {batch_size}, {rounds} rounds, float32, one thread; ratios are medians over rounds."
    )
    parts = [
        f"# DMAE: {student} from {teacher}",
        step_cost.describe_machine("mae_step.py"),
        f"{note} The losses of the first two steps agree to 1e-5.",
        "\n".join(lines),
    ]
    print("\n\n".join(parts))
    if write:
        step_cost.keep(f"mae_step_{pair}", parts)


if __name__ == "__main__":
    step_cost.start(main)
