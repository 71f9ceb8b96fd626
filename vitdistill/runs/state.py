"""What a run resumes from: everything that changes while it trains, saved and loaded."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..distill.step import Distillation
from ..errors import DataError, Say
from ..messages import first_line
from ..storage import checkpoint
from ..storage.optimizer import pack_optimizer, unpack_optimizer
from ..world import World
from .folder import RunFolder
from .nonfinite import refuse_nonfinite
from .optim import make_optimizer
from .prepare import Prepared

_NUMBERS = ("step", "evaluated_at", "scores", "best", "best_step", "seconds")


@dataclass
class State:
    """Everything that changes while a run trains.

    Add a number as a field here and a name in ``_NUMBERS``, weights as a line of `modules`.
    """

    distillation: Distillation
    ema: ModelEmaV3 | None  # moving average of the student's weights
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None  # of the loss, for float16
    # Sums of the logged values since the last log line, float64, on the device; the last one counts
    # the steps.
    sums: Tensor
    step: int = 0  # optimizer steps taken
    evaluated_at: int = -1  # the step of the last evaluation
    scores: dict[str, float] = field(default_factory=dict)  # its result
    # Highest top-1 accuracy and minus its nll (lowest of ties); reached at best_step.
    best: list[float] | None = None
    best_step: int = -1
    seconds: float = 0.0  # spent in all sessions of the run

    def pack(self) -> tuple[dict[str, Tensor], Any]:
        """Return all tensors by their checkpoint names, and the structure of the optimizer's."""
        tensors, structure = pack_optimizer(self.optimizer.state_dict())
        for name, module in self.modules.items():
            tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        return tensors, structure

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Modules with weights, by the prefix of their tensors in a checkpoint."""
        found: dict[str, nn.Module] = {"distillation": self.distillation}
        return found if self.ema is None else {**found, "ema": self.ema.module}


def begin(prepared: Prepared, num_values: int) -> State:
    """Make the state of a run before its first step, with ``num_values`` logged values."""
    distillation, decay = prepared.distillation, prepared.recipe.train.ema_decay
    device = prepared.world.device
    return State(
        distillation,
        None if decay is None else ModelEmaV3(distillation.student, decay=decay),
        make_optimizer(distillation, prepared.recipe.optim),
        torch.amp.GradScaler(device.type) if prepared.amp_dtype is torch.float16 else None,
        torch.zeros(num_values + 1, dtype=torch.float64, device=device),
    )


def save(state: State, prepared: Prepared, folder: RunFolder | None) -> None:
    """Save the state; call it on every process, with a ``folder`` on the one that writes.

    The logs are synced first and their lengths saved: a resume cuts them back to these, so that
    they hold every step once.
    """
    world = prepared.world
    sums = world.gather(state.sums.tolist())
    with world.together():
        if folder is None:
            return
        # Only a checkpoint that passed this check may replace older ones.
        tensors, structure = state.pack()
        refuse_nonfinite(tensors)
        numbers = {name: getattr(state, name) for name in _NUMBERS} | {
            "sums": sums,
            "optimizer": structure,
            "scaler": None if state.scaler is None else state.scaler.state_dict(),
            "offsets": folder.offsets(),
        }
        keep = prepared.recipe.train.keep_checkpoints
        checkpoint.save(folder.path, state.step, tensors, numbers, keep=keep)


def find(output: Path, world: World, say: Say) -> tuple[Path, checkpoint.State] | None:
    """Read the newest whole checkpoint of a run, the same one on every process."""
    saved = None
    with world.together():
        if world.is_main:
            checkpoint.settle(output)
            saved = checkpoint.load_latest(output, warn=say, check=refuse_nonfinite)
    path = world.gather(None if saved is None else saved[0])[0]
    with world.together():
        return saved if saved or path is None else (path, checkpoint.load(path))


def load(state: State, world: World, saved: tuple[Path, checkpoint.State]) -> dict[str, int]:
    """Load a checkpoint, and return where its logs ended; `DataError` if it does not fit."""
    found, (tensors, numbers) = saved
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in state.modules}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = tensor
    try:
        for name, module in state.modules.items():
            module.load_state_dict(parts[name])
        state.optimizer.load_state_dict(unpack_optimizer(tensors, numbers["optimizer"]))
        if state.scaler is not None:
            state.scaler.load_state_dict(numbers["scaler"])
        for name in _NUMBERS:
            setattr(state, name, numbers[name])
        # Each process resumes its own sums; if their number changed, all take the mean.
        sums = torch.tensor(numbers["sums"], dtype=torch.float64)
        state.sums.copy_(sums[world.rank] if len(sums) == world.size else sums.mean(0))
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = first_line(error)
        what = f"{found} does not fit this version's student and optimizer ({reason})"
        raise DataError(what, "resume with the version it began with") from error
    return dict(numbers["offsets"])
