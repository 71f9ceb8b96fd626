"""What a plan costs before it runs: FLOPs counted on the training step itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data.augment import InputSpec
from ..distill.plan import Plan
from ..distill.step import Distillation, blank_batch
from ..distill.teacher import Teacher
from ..vit.copies import on_meta
from ..vit.flops import count_flops, forward_flops, training_flops
from ..vit.network import Network
from ..vit.output import ViTOutput

IMAGENET_TRAIN_IMAGES = 1_281_167


def vit_macs(network: Network, num_keep: int | None = None) -> int:
    """Count multiply-accumulates of one plain ViT forward pass as the MaskedKD paper does.

    Every patch is embedded, every block runs whole, on K kept patches and one class token:
    ``N (3 p^2) D + L (12 n D^2 + 2 n^2 D) + D C`` with ``n = K + 1``, for an MLP ratio of 4.

    Source: the teacher cost column of arXiv 2302.10494 (10^15 MACs over images x epochs), within
    0.3 %.
    """
    n = (network.num_patches if num_keep is None else num_keep) + 1
    d = network.dim
    embed = network.num_patches * 3 * network.patch_size[0] * network.patch_size[1] * d
    block = 12 * n * d**2 + 2 * n**2 * d
    return embed + network.depth * block + d * network.num_classes


@dataclass(frozen=True)
class Cost:
    """FLOPs an image of one training step (a multiply-accumulate is 2), and its memory.

    ``*_plain`` is without this plan: the student alone by its own forward, the whole teacher on the
    whole image.
    """

    student: int  # forward and backward
    student_plain: int
    teachers: dict[str, int]  # forward, guides included
    teachers_plain: dict[str, int]
    objectives: dict[str, int]  # forward and backward of what each computes itself
    adapters: dict[str, int]  # parameters of each objective's own trainable part, if it has one
    activations: int  # bytes an image that are kept for the backward pass, in float32
    activations_plain: int

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
    """Count what ``plan`` computes an image, by running its step on the meta device.

    Networks are left as they are; teachers whose answers are stored may be missing. ``batch_size``
    is the images of a micro-batch: work done once for all is shared among them, and work on pairs
    of them grows with it.
    """
    batch_size = max(batch_size, 2)  # some batch norms refuse to train on one value a channel
    model = on_meta(student).train()
    live = {name: teachers[name] for name in plan.live}
    plain = {name: forward_flops(m, plan.teachers[name].image_size) for name, m in live.items()}
    kept_plain = _Kept()
    with kept_plain:
        student_plain = training_flops(model, plan.student.image_size)
    with torch.device("meta"):
        distillation = Distillation(model, plan)
    stand_ins = {
        name: stand_in(on_meta(m), plan.teachers[name], distillation, "meta")
        for name, m in live.items()
    }
    counts, kept = dict.fromkeys([*plan.stored, *plan.live], 0), _Kept()
    for name, teacher in stand_ins.items():
        teacher.run = _counting(teacher.run, counts, name)
    batch = blank_batch(plan, batch_size, "meta")
    with kept, count_flops() as counter:
        output, answers = distillation.answer(batch, stand_ins)
        losses = [distillation.loss(name, output, answers, batch) for name in plan.objectives]
        torch.stack(losses).sum().backward()
    total = counter.get_total_flops() - sum(counts.values())
    objectives = {}
    for name in plan.objectives:
        with count_flops() as counter:
            distillation.loss(name, _cut(output), answers, batch).backward()
        objectives[name] = counter.get_total_flops() // batch_size
    return Cost(
        student=total // batch_size - sum(objectives.values()),
        student_plain=student_plain,
        teachers={name: count // batch_size for name, count in counts.items()},
        teachers_plain=plain | {name: plan.teachers[name].flops for name in plan.stored},
        objectives=objectives,
        adapters={
            name: sum(p.numel() for p in adapter.parameters())
            for name, adapter in distillation.adapters.items()
        },
        activations=kept.bytes // batch_size,
        activations_plain=kept_plain.bytes // 2,
    )


def stand_in(
    model: nn.Module,
    network: Network,
    distillation: Distillation,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
) -> Teacher:
    """Make a teacher that answers in ``network.num_classes`` classes, whatever its own head."""
    # Costs do not depend on the normalisation.
    spec = InputSpec(network.image_size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    images = replace(spec, image_size=distillation.plan.student.image_size)
    own, index = getattr(model, "num_classes", 0), None
    if own and network.num_classes != own:
        index = torch.arange(network.num_classes) % own
    return Teacher(model, network, spec, images, class_index=index, dtype=dtype, device=device)


def _counting(
    run: Callable[..., ViTOutput], counts: dict[str, int], name: str
) -> Callable[..., ViTOutput]:
    """Add the FLOPs of every call to ``counts[name]``."""

    def counted(*args: Any) -> ViTOutput:
        with count_flops() as counter:
            output = run(*args)
        counts[name] += counter.get_total_flops()
        return output

    return counted


def _cut(value: Any) -> Any:
    """Detach a recorded output from its graph, so that what computed it is not counted."""
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
    """Counts what autograd keeps for the backward pass, without weights, each storage once."""

    def __init__(self) -> None:
        self.storages: dict[int, torch.UntypedStorage] = {}
        super().__init__(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if not isinstance(base, nn.Parameter):
            storage = tensor.untyped_storage()
            self.storages[storage._cdata] = storage  # kept, so that no other one gets its address
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())
