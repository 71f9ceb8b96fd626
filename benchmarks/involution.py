"""What our involution costs in CPU time and extra memory, against the naive one, which unfolds the
image.

    python benchmarks/involution.py            # about three minutes
    python benchmarks/involution.py --write    # keep the table in benchmarks/results/

Both are the same module with the same weights, including the small convolutions that make the
kernels; only the sum over the neighbourhood differs. They take turns in one process and are
compared within a round. The clock is the CPU time of this process. Extra memory is the most that
torch held at once beyond inputs and weights, by its profiler. Random images, float32, one thread;
"training" is forward and backward.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import step_cost
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from vitdistill.errors import ConfigError
from vitdistill.models.involution import Involution

TARGET = 0.15
WARM_UP = 2


@dataclass(frozen=True)
class Case:
    """One involution and its input; ``target``: what time and memory may be of the naive ones at
    most.
    """

    batch_size: int
    channels: int
    side: int
    kernel_size: int = 7
    stride: int = 1
    training: bool = False
    target: float | None = None

    @property
    def title(self) -> str:
        """A cell of the table."""
        size = f"{self.batch_size} x {self.channels} x {self.side} x {self.side}"
        return (
            f"{size}, kernel {self.kernel_size}, stride {self.stride},"
            f" {'training' if self.training else 'forward'}"
        )


CASES = (
    Case(1, 64, 56, target=TARGET),
    Case(8, 64, 56, target=TARGET),
    Case(8, 64, 56, training=True),
    Case(8, 128, 56, stride=2),
    Case(8, 512, 7),
    Case(8, 32, 112, kernel_size=3),
    Case(32, 64, 32),
    Case(32, 64, 32, training=True),
    Case(32, 512, 4),
    Case(32, 512, 4, training=True),
)


class Naive(nn.Module):
    """The definition as it is usually written: every neighbourhood copied out, weighed and
    summed.
    """

    def __init__(self, module: Involution) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        module, size = self.module, self.module.kernel_size
        kernel = module.conv2(module.conv1(module.pool(x)))
        groups, places = kernel.shape[1] // size**2, kernel.shape[2:]
        unfolded = F.unfold(x, size, padding=size // 2, stride=module.stride)
        unfolded = unfolded.view(len(x), groups, x.shape[1] // groups, size**2, *places)
        return (
            (kernel.view(len(x), groups, 1, size**2, *places) * unfolded)
            .sum(3)
            .view(len(x), x.shape[1], *places)
        )


@dataclass
class Measured:
    """One form of one case: CPU seconds and peak bytes, one entry a round."""

    run: Callable[[], None]
    seconds: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)


def peak_memory(run: Callable[[], None]) -> int:
    """Bytes that torch held at most at one time during ``run``, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = [
        event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def forms(case: Case) -> tuple[Measured, Measured]:
    """The naive form and ours, on the same input, checked against one another."""
    torch.manual_seed(0)
    module = Involution(case.channels, case.kernel_size, case.stride).train(case.training)
    images = torch.randn(
        case.batch_size, case.channels, case.side, case.side, requires_grad=case.training
    )
    naive = Naive(module)
    with torch.no_grad():
        torch.testing.assert_close(module(images), naive(images), rtol=1e-4, atol=1e-3)

    def step(network: nn.Module) -> None:
        if case.training:
            torch.autograd.grad(network(images).sum(), [images, *network.parameters()])
        else:
            with torch.no_grad():
                network(images)

    return Measured(lambda: step(naive)), Measured(lambda: step(module))


def measure(pair: tuple[Measured, Measured], rounds: int) -> None:
    """Run both once a round for the time and once for the memory, in shuffled order, after a
    warm-up.
    """
    shuffle = random.Random(0).shuffle
    for r in range(-WARM_UP, rounds):
        order = list(pair)
        shuffle(order)
        for form in order:
            start = time.process_time()
            form.run()
            if r >= 0:
                form.seconds.append(time.process_time() - start)
                form.bytes.append(peak_memory(form.run))


def row(case: Case, naive: Measured, ours: Measured) -> str:
    """A Markdown row: milliseconds, ratio with quartiles, megabytes, ratio, target."""
    time_ratios = [mine / its for mine, its in zip(ours.seconds, naive.seconds, strict=True)]
    memory_ratio = statistics.median(
        mine / its for mine, its in zip(ours.bytes, naive.bytes, strict=True)
    )
    time_ratio = statistics.median(time_ratios)
    low, _, high = statistics.quantiles(time_ratios, n=4, method="inclusive")
    met = case.target is None or max(time_ratio, memory_ratio) <= case.target
    cells = (
        case.title,
        *(f"{1e3 * statistics.median(form.seconds):.1f}" for form in (naive, ours)),
        f"**{time_ratio:.3f}**",
        f"{low:.3f} .. {high:.3f}",
        *(f"{statistics.median(form.bytes) / 1e6:.1f}" for form in (naive, ours)),
        f"**{memory_ratio:.3f}**",
        "" if case.target is None else f"{case.target:.2f} {'met' if met else 'MISSED'}",
    )
    return f"| {' | '.join(cells)} |"


def table(rounds: int) -> Iterator[str]:
    """The Markdown table, row by row as it is measured."""
    yield (
        "| batch x channels x sides | naive ms | ours ms | time ratio | quartiles | naive MB | ours"
        " MB | memory ratio | target |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for case in CASES:
        pair = forms(case)
        measure(pair, rounds)
        yield row(case, *pair)


def main(rounds: int = 9, write: bool = False) -> None:
    """Measure our involution against the naive one.

    Args:
        rounds: of both forms, at least 5.
        write: also write the table to benchmarks/results/involution_<cpu>_<instructions>_<date>.md.
    """
    if rounds < 5:
        raise ConfigError(f"--rounds is {rounds}: medians need at least 5")
    torch.set_num_threads(1)
    machine = step_cost.describe_machine("involution.py")
    print(machine + "\n")
    lines = []
    for line in table(rounds):
        print(line, flush=True)
        lines.append(line)
    if write:
        note = (
            f"{rounds} rounds, float32, one thread; ratios are ours to naive, median over rounds."
        )
        step_cost.keep(
            "involution", ["# Involution against the naive unfold", machine, note, "\n".join(lines)]
        )


if __name__ == "__main__":
    step_cost.start(main)
