"""Optimizer and schedule, both timm's.

The schedule is a pure function of the step, so a checkpoint holds nothing of it.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.optim import (
    create_optimizer_v2,
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler_v2
from torch import nn

from ..distill.step import Distillation
from ..errors import ConfigError, Set
from ..messages import first_line, suggest
from ..recipes.config import OptimConfig

_FUSED = ("adamw", "adam", "sgd", "nesterov", "momentum")


def parameter_groups(distillation: Distillation, config: OptimConfig) -> list[dict[str, Any]]:
    """Group parameters by weight decay and learning rate, the student's as timm does.

    Adapters follow; their vectors do not decay.
    """
    student: Any = distillation.student
    exempt = student.no_weight_decay() if hasattr(student, "no_weight_decay") else ()
    how: dict[str, Any] = {"weight_decay": config.weight_decay, "no_weight_decay_list": exempt}
    if config.layer_decay is None:
        groups = param_groups_weight_decay(student, **how)
    elif hasattr(student, "group_matcher"):
        groups = param_groups_layer_decay(student, layer_decay=config.layer_decay, **how)
    else:
        does_not = f"{type(student).__name__} does not"
        what = f"layer_decay needs a timm model that names its layers: {does_not}"
        raise ConfigError(what, Set("optim.layer_decay", "none"))
    if len(distillation.adapters):
        groups += param_groups_weight_decay(distillation.adapters, weight_decay=config.weight_decay)
    return [group for group in groups if group["params"]]


def make_optimizer(distillation: Distillation, config: OptimConfig) -> torch.optim.Optimizer:
    """Make a timm optimizer over student and adapters.

    Raises:
        ConfigError: there is none of that name, or it does not take these arguments.
    """
    extra = dict(config.opt_args)
    if "betas" in extra:
        extra["betas"] = tuple(extra["betas"])
    # The fused kernel takes 0.6 % of a step instead of 1.9 %. It refuses the meta device, where an
    # optimizer is only tried.
    device = next(distillation.parameters()).device.type
    if config.opt.lower() in _FUSED and device in ("cpu", "cuda"):
        extra.setdefault("fused", True)
    elif device == "meta":
        extra.pop("fused", None)
    groups = parameter_groups(distillation, config)
    try:
        optimizer = create_optimizer_v2(
            groups,
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            **extra,
        )
        assert not getattr(optimizer, "is_second_order", False), "it needs second derivatives"
    except (AssertionError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        known = [str(name) for name in list_optimizers()]
        if config.opt.lower().removeprefix("lookahead_") not in known:
            what, fix = f"there is no optimizer {config.opt!r}", suggest(config.opt, known)
            raise ConfigError(what, fix, field="optim.opt") from None
        args = f"opt_args {config.opt_args} ({first_line(error)})"
        what = f"the optimizer {config.opt} cannot be made with {args}"
        raise ConfigError(what, (Set("optim.opt_args"), Set("optim.opt"))) from error
    if config.sched == "none":
        # A schedule multiplies by lr_scale at every step; without one, layer decay is applied here.
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
    return optimizer


def make_schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig, epochs: int, steps_per_epoch: int
) -> Callable[[int], None]:
    """Return a function that sets the learning rate of step s, counted from 0, before it."""
    if config.sched == "none":
        return lambda step: None
    # timm starts the schedule after a warm-up prefix, so it is shorter by that.
    length = epochs - config.warmup_epochs if config.warmup_prefix else epochs
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.sched,
        num_epochs=length,  # type: ignore[arg-type]
        warmup_prefix=config.warmup_prefix,
        min_lr=config.min_lr,
        warmup_lr=config.warmup_lr,
        warmup_epochs=config.warmup_epochs,  # type: ignore[arg-type]
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    assert scheduler is not None
    return scheduler.step_update


def gradient_norm(module: nn.Module) -> torch.Tensor:
    """Return the norm of all gradients, on the device; not finite if any of them is not."""
    return torch.nn.utils.get_total_norm(
        [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    )


def clip_gradients(module: nn.Module, max_norm: float | None, norm: torch.Tensor) -> None:
    """Scale gradients in place so that their ``norm`` is at most ``max_norm``; None: never."""
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(module.parameters(), max_norm, norm)


def take_step(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None, finite: torch.Tensor
) -> None:
    """Step if ``finite`` is true; a scaler checks its gradients itself.

    Fused optimizers decide on the device; for others the host waits.
    """
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    elif getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif bool(finite):
        optimizer.step()
