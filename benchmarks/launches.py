"""Count the operations of a training step, against timm's own step and its distillation task.

    python benchmarks/launches.py          # a minute
    python benchmarks/launches.py --write  # keep the table in benchmarks/results/

A GPU starts at least one kernel for each, which limits a small network on a fast card. They are
counted on a CPU. Views and reservations of memory start nothing and are left out; an operation on
a list of tensors (an optimizer's) counts once. The steps are those of `steps.py`.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from step_cost import PAIRS, describe_machine, keep, start
from steps import Made, Maker
from torch.utils._python_dispatch import TorchDispatchMode

_STUDENT = PAIRS["cifar"].student
PAIR = replace(  # twelve blocks each, as DeiT-Ti and DeiT-S have
    PAIRS["cifar"],
    title="ViT of width 192 from width 384, 12 blocks each, patch 4 on 32 x 32",
    student=(_STUDENT[0], {**_STUDENT[1], "depth": 12}),
    batch_size=4,
)
PHASES = ("student", "teachers", "losses", "backward", "rest")
RESERVES = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach")
RESERVES += ("_unsafe_view", "alias", "lift_fresh", "_reshape_alias", "promote_types")
# An optimizer that is not fused reads its step counts, which are on the host.
ON_HOST = ("_local_scalar_dense", "_record_function_enter_new", "_record_function_exit")


class Counted(TorchDispatchMode):
    """Counts operations by the phase that is set."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "rest"
        self.counts: dict[str, Counter[str]] = {phase: Counter() for phase in PHASES}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in RESERVES + ON_HOST:
            self.counts[self.phase][name] += 1
        return func(*args, **(kwargs or {}))

    def during(self, phase: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``run``, its operations counted for ``phase``."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            before, self.phase = self.phase, phase
            try:
                return run(*args, **kwargs)
            finally:
                self.phase = before

        return counted


def count(step: Made) -> Counted:
    """Count a step's operations, after two that make what is made once."""
    for _ in range(2):
        step.run(Counted().during)
    with Counted() as counted:
        step.run(counted.during)
    return counted


def main(write: bool = False, details: bool = False) -> None:
    """Count the operations of a training step.

    Args:
        write: keep the table in benchmarks/results/launches_<cpu>_<instructions>_<date>.md.
        details: also print every operation by phase.
    """
    torch.set_num_threads(1)
    lines = [f"| step | {' | '.join(PHASES)} | together | against timm's |"]
    lines.append("|---|" + "---:|" * (len(PHASES) + 2))
    totals: dict[str, int] = {}
    for name, make in Maker(PAIR, PAIR.batch_size).all().items():
        step = make()
        counted = count(step)
        each = [counted.counts[phase].total() for phase in PHASES]
        totals[name] = sum(each)
        share = f"{totals[name] / totals[step.other]:.2f}" if name != step.other else ""
        lines.append(f"| {name} | {' | '.join(map(str, each))} | **{totals[name]}** | {share} |")
        for phase in PHASES if details else ():
            print(name, phase, dict(counted.counts[phase].most_common()))
    about = f"{PAIR.title}; one micro-batch, float32."
    parts = ["# Operations a training step dispatches", describe_machine("launches.py"), about]
    parts.append("\n".join(lines))
    print("\n\n".join(parts))
    if write:
        keep("launches", parts)


if __name__ == "__main__":
    start(main)
