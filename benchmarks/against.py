"""Compare the cost of a step in this tree with that in another checkout, in one run.

    git worktree add ../before COMMIT
    python benchmarks/against.py ../before cifar --rounds 9

Each tree's own ``benchmarks/step_cost.py`` builds the steps in a process of its own; the two take
turns, step by step, in changing order. The clock is the CPU time of the process that runs the step.
A step is compared with the same step of the other tree in the same round.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
WORKER = """
import importlib.util, sys, time, torch
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("step_cost", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["step_cost"] = module
spec.loader.exec_module(module)
pair = module.PAIRS[sys.argv[2]]
steps = module.build_steps(pair, pair.batch_size)
print("|".join(step.name for step in steps), flush=True)
for line in sys.stdin:
    begun = time.process_time()
    steps[int(line)].run()
    print(time.process_time() - begun, flush=True)
"""


class Tree:
    """A checkout whose steps run in a process of their own."""

    def __init__(self, root: Path, setting: str) -> None:
        script = str(root / "benchmarks" / "step_cost.py")
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        # Python looks into the current folder first, so that is the tree itself.
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, script, setting],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=root,
        )
        self.steps = self._answer().split("|")

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def run(self, step: int) -> float:
        """Run a step once; seconds of CPU time."""
        assert self.process.stdin is not None
        print(step, file=self.process.stdin, flush=True)
        return float(self._answer())


def main() -> None:
    """Print the ratio of this tree to the other for every step: median, quartiles."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("setting", choices=("deit", "cifar"), nargs="?", default="cifar")
    parser.add_argument("--rounds", type=int, default=9, help="of all steps (default: 9)")
    arguments = parser.parse_args()
    trees = [Tree(HERE, arguments.setting), Tree(arguments.before.resolve(), arguments.setting)]
    assert trees[0].steps == trees[1].steps, "the two trees measure other steps"
    turns = [(tree, step) for step in range(len(trees[0].steps)) for tree in (0, 1)]
    seconds: dict[tuple[int, int], list[float]] = {turn: [] for turn in turns}
    shuffle = random.Random(0).shuffle
    for r in range(-2, arguments.rounds):
        pairs = [turns[i : i + 2] for i in range(0, len(turns), 2)]
        shuffle(pairs)
        for pair in pairs:
            shuffle(pair)
            for tree, step in pair:
                spent = trees[tree].run(step)
                if r >= 0:
                    seconds[tree, step].append(spent)
    print("| step | now / before | quartiles |\n|---|---:|---:|")
    for step, name in enumerate(trees[0].steps):
        ratios = [a / b for a, b in zip(seconds[0, step], seconds[1, step], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        print(f"| {name} | **{middle:.3f}** | {low:.3f} .. {high:.3f} |")


if __name__ == "__main__":
    main()
