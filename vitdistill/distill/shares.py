"""How much each objective weighs at the start of a run, in the loss and in its gradient."""

from collections.abc import Mapping

import torch

from ..data.batch import Batch
from ..errors import ConfigError, Drop, Set, UserError
from .step import Distillation
from .teacher import Teacher

LEAST = 0.02  # the share of the gradient below which a term is nearly nothing
SCALE = 2.0**10  # of losses, so that gradients do not vanish in float16

Shares = dict[str, tuple[float, float]]  # of the loss, of the gradient's norm, by objective


def measure_shares(
    distillation: Distillation, batch: Batch, teachers: Mapping[str, Teacher]
) -> Shares:
    """Return each objective's share of a batch's loss and of the student's gradient norms."""
    parameters = [p for p in distillation.student.parameters() if p.requires_grad]
    buffers = {name: buffer.clone() for name, buffer in distillation.named_buffers()}
    # Compiled code is specialised to the run's batches, and allows one backward pass only.
    with torch.compiler.set_stance("force_eager"):
        losses = distillation(batch, teachers)
    found = {}
    for name, objective in distillation.plan.objectives.items():
        if objective.weight_at(0.0) > 0:  # else it comes in later
            loss = losses[name] * SCALE
            grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            norm = torch.nn.utils.get_total_norm([g for g in grads if g is not None])
            found[name] = abs(loss.item()), norm.item()
    for name, buffer in distillation.named_buffers():
        buffer.copy_(buffers[name])  # BatchNorm has seen the batch
    whole, moved = (sum(pair[i] for pair in found.values()) or 1.0 for i in (0, 1))
    return {name: (loss / whole, norm / moved) for name, (loss, norm) in found.items()}


def describe_shares(shares: Shares) -> list[str | UserError]:
    """Say what each of several objectives weighs, and which are nearly nothing."""
    if len(shares) < 2:
        return []
    parts = [f"{name} {loss:.0%} / {of:.0%}" for name, (loss, of) in shares.items()]
    first = f"shares of the loss / of its gradient at the start: {', '.join(parts)}"
    lines: list[str | UserError] = [first]
    for name, (_, of) in shares.items():
        if of < LEAST:
            what = f"{name} is nearly nothing beside the others, {of:.1%} of the gradient"
            lines.append(ConfigError(what, (Set(f"objectives.{name}.weight"), Drop(name))))
    return lines
