"""The training loop, for one process or many, and every way it can stop.

Samples, views and the order of both depend on the recipe alone. Dropout and stochastic depth are
drawn a micro-batch at a time, so their draws (and nothing else) also depend on the number of
processes and micro-batches.
"""

import json
import math
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from torch import nn

from ..data.batch import Batch
from ..distill.step import UNWEIGHTED
from ..errors import ConfigError, NonFiniteError, Preempted, Set, Spell, UserError
from ..evaluate.accuracy import evaluate
from ..evaluate.features import Stopped
from ..evaluate.knn import knn_evaluation
from ..memory import SMALLER_EVALUATION, memory_errors
from ..messages import plural
from ..recipes.config import Recipe
from ..recipes.yaml import load_recipe
from ..storage.atomic import write_atomic
from ..world import agreed, join_world
from . import state as states
from .display import Display, Speed
from .feed import Feed
from .folder import RunFolder, finished, saved_recipe
from .identity import RECIPE, SUMMARY, note_identity, read_identity
from .loggers import check_loggers
from .nonfinite import nonfinite_error, refuse_nonfinite, step_errors
from .optim import clip_gradients, gradient_norm, make_schedule, take_step
from .prepare import Prepared, distribute, open_images, prepare, shares_at_start
from .report import Report
from .stop import StopRequest
from .stored import with_views_of_labels

SKIPPED = "skipped_steps"
"""Steps since the last log line that had no effect because a gradient overflowed float16."""


def train(
    recipe: Recipe,
    output: str | Path,
    *,
    device: str = "auto",
    console: Console | None = None,
    spell: Spell = str,
    prepared: Callable[[Prepared], None] | None = None,
) -> dict[str, Any]:
    """Train a recipe's student into the run folder ``output``, or resume the run that is there.

    Args:
        recipe: of one run.
        output: the run folder.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        console: where progress is shown.
        spell: makes the sentences of warnings, where these are not for a Python user.
        prepared: called on the main process before the first step.

    Returns:
        The run's summary, which is also in ``summary.json``.

    Raises:
        UserError: the same on every process; if possible before the run folder is touched.
        Preempted: the run was asked to stop, and has saved its state.
    """
    output = Path(output)
    begun = saved_recipe(output)
    recipe = with_views_of_labels(recipe, begun)
    with join_world(device) as world, ExitStack() as stack:
        display = Display(console or Console(), world.is_main, spell)
        summary = world.from_main(partial(_find_summary, output, recipe))
        if summary is not None:
            display.say(f"{output} is finished already: nothing to do")
            return summary
        check_loggers(recipe.train.log_to)
        stack.enter_context(display)
        display.working("preparing: images, networks, and the proof of teachers")
        begun_in = world.from_main(partial(read_identity, output)).get("precision")
        run = prepare(recipe, world, display.say, begun_in)
        folder = None
        with world.together():
            if world.is_main:
                if begun is None:
                    for line in shares_at_start(run):
                        display.say(line)
                if prepared is not None:
                    prepared(run)
                folder = stack.enter_context(RunFolder(output, recipe, run.identity()))
        return Trainer(run, output, folder, display).finish()


def _find_summary(output: Path, recipe: Recipe) -> dict[str, Any] | None:
    """Return the summary of this very run if it is finished; `DataError` if it learnt from other
    images. Its own images may be gone: it no longer needs them.
    """
    summary = finished(output, recipe)
    if summary is None or recipe.train.accept_changed_images:
        return summary
    try:
        seen = open_images(recipe).train.fingerprint()
    except UserError:
        if recipe.data.dir != load_recipe(output / RECIPE).data.dir:
            raise
    else:
        note_identity(output, recipe, {"training images": seen})
    return summary


class Trainer:
    """A running run."""

    def __init__(
        self, prepared: Prepared, output: Path, folder: RunFolder | None, display: Display
    ) -> None:
        """Make the state, or load the one in ``output``; ``folder``: None off the main process."""
        self.prepared, self.output, self.folder = prepared, output, folder
        self.display, self.say = display, display.say
        self.world, self.recipe = prepared.world, prepared.recipe
        self.steps_per_epoch = prepared.loaders.train.steps_per_epoch
        self.num_steps = self.steps_per_epoch * self.recipe.train.epochs
        terms = prepared.plan.objectives
        self.losses = [*terms, "loss", *(f"{name}{UNWEIGHTED}" for name in terms)]
        half = prepared.amp_dtype is torch.float16
        self.names = [*self.losses, *([SKIPPED] if half else []), "grad_norm"]
        self.stop = StopRequest()
        self.unsaved = False
        self.ending: UserError | None = None  # ends the run after a save, on every process
        self._resume()
        self.window = int(self.state.sums[-1])  # steps since the last log line
        # Weights are loaded by now: DistributedDataParallel sends rank 0's to all when it is made.
        self.module = distribute(prepared)
        left = self.num_steps - self.state.step
        steps = prepared.loaders.train.batches(self.state.step, left)
        self.feed = Feed(steps, self.world.device)
        self.speed = Speed(self.recipe.train.batch_size)
        self.report = None
        if folder is not None:
            self.report = Report(prepared, folder, self.state.step, self.say)
        display.begin(self.state.step, self.num_steps, self.steps_per_epoch)

    def _resume(self) -> None:
        """Make the state, and load what was saved of it."""
        found, before = states.find(self.output, self.world, self.say), ""
        with self.world.together():
            self.state = states.begin(self.prepared, len(self.names))
            # A new schedule sets the learning rates of step 0, so loading comes after it.
            length = self.recipe.train.epochs, self.steps_per_epoch
            self.schedule = make_schedule(self.state.optimizer, self.recipe.optim, *length)
            offsets = {} if found is None else states.load(self.state, self.world, found)
            if self.state.step > self.num_steps:  # images are gone, and that was accepted
                what = f"{self.output} is at step {self.state.step}, and these images and epochs"
                fixes = "restore the images", Set("train.epochs")
                raise ConfigError(f"{what} make {self.num_steps} steps", fixes, field="data.dir")
            if self.folder is not None:
                # Lines beyond the checkpoint are of steps that will be taken again.
                self.folder.open_logs(offsets)
                # A resume elsewhere sees the same samples and views; other libraries, processors or
                # numbers of processes may change the last bits of what is computed.
                notes = self.prepared.images.notes
                before = self.folder.record_environment(self.state.step, self.world, notes)
        if found is not None:
            self.say(f"resuming {self.output} at step {self.state.step} of {self.num_steps}")
        if before:
            self.say(
                f"the run moves from {before} to {self.world.device_name}: sums are rounded"
                " differently, and dropout and stochastic depth draw other numbers"
            )

    # --- the loop --------------------------------------------------------------------------------

    def finish(self) -> dict[str, Any]:
        """Train to the end, or until asked to stop; return the summary.

        Between two steps, in this order:

        1. evaluate at the end of every ``eval_every``-th epoch, and of the last one;
        2. save what was learnt and leave, if an error or a signal ends the run;
        3. save every ``save_every`` steps, and after the last one;
        4. write the summary, after the last step;
        5. take a step, and log.
        """
        state, train = self.state, self.recipe.train
        begun = time.perf_counter() - state.seconds
        with ExitStack() as stack:
            stack.enter_context(self.stop)
            stack.enter_context(step_errors(self.prepared, self.output, lambda: state.step))
            stack.callback(self.feed.close)
            if self.report is not None:
                stack.callback(self.report.loggers.close)
            self.feed.fetch()
            self.ending, self.feed.waited = self.world.settle(self.feed.error), 0.0
            while True:
                if self.ending is None and self._evaluation_is_due():
                    self.evaluate()
                state.seconds = time.perf_counter() - begun
                done = state.step == self.num_steps
                if self.ending is not None:
                    self._leave(self.ending)
                if self.unsaved and (
                    done or state.step % (train.save_every or self.steps_per_epoch) == 0
                ):
                    self.save()
                if done:
                    return self._summarise()
                self.step()
                if state.step % train.log_every == 0 or state.step % self.steps_per_epoch == 0:
                    self.log()

    def step(self) -> None:
        """Take one optimizer step; the host does not wait for the device.

        After the first NaN or infinity no step is applied: `_read` finds it. A step that float16
        skips still counts: the schedule, the moving average and the images go on.
        """
        prepared, state, micro_batches = self.prepared, self.state, self.feed.batches
        assert micro_batches is not None
        self.schedule(state.step)
        state.optimizer.zero_grad()
        self._backward(micro_batches)
        if state.scaler is not None:
            # Gradients are clipped and judged at their own scale.
            state.scaler.unscale_(state.optimizer)
        norm = noted = gradient_norm(prepared.distillation)
        if state.scaler is not None:
            # float16 gradients overflow now and then, and the scaler skips such a step. Once its
            # scale is used up, they are not finite for another reason.
            usable = state.scaler.scale(torch.ones_like(norm)) >= 1
            skipped = usable & ~norm.isfinite()
            noted = norm.masked_fill(skipped, 0)
            state.sums[-3].add_(skipped)
        state.sums[-2].add_(noted)
        # NaN and infinity stay in the sums, even from earlier steps; either minus itself is NaN.
        total = state.sums.sum()
        finite = total - total == 0
        state.sums[-1].add_(finite)
        clip_gradients(prepared.distillation, self.recipe.optim.clip_grad, norm)
        take_step(state.optimizer, state.scaler, finite)
        self.window += 1
        state.step += 1
        if state.ema is not None:
            state.ema.update(prepared.student, step=state.step)
        self.unsaved = True
        self.speed.tick()
        self.display.tick(state.step)
        # The device has all its work by now: the host fetches the next batches meanwhile.
        self.feed.fetch()
        # The processes meet here once: what only one of them knew (a signal, a damaged image), all
        # know afterwards.
        stopped, failed = self.world.any(bool(self.stop), self.feed.error is not None)
        # The step counts: an error of the next batch, or a signal, ends the run after it is saved.
        if failed:
            self.ending = self.world.settle(self.feed.error)
        elif stopped:
            self.ending = self._preempted()

    def _backward(self, micro_batches: tuple[Batch, ...]) -> None:
        """Add up a step's gradients, and its losses on the device."""
        state, count = self.state, len(micro_batches)
        self.prepared.distillation.train()
        for i, batch in enumerate(micro_batches):
            # Processes exchange gradients once a step, with those of the last micro-batch.
            exchange = self.world.size == 1 or i == count - 1
            with nullcontext() if exchange else self.module.no_sync():  # type: ignore[operator]
                with self.prepared.in_micro_batch(state.step, i):
                    losses = self.module(batch, self.prepared.teachers, state.step / self.num_steps)
                loss = losses["loss"] / count
                (loss if state.scaler is None else state.scaler.scale(loss)).backward()
            values = torch.stack([losses[name].detach() for name in self.losses])
            state.sums[: len(values)].add_(values / count)

    def _read(self) -> list[float]:
        """Return the sums since the last log line, as means over the processes.

        Raises:
            NonFiniteError: a number is not finite; the state is that before the first such step.
        """
        sums: list[float] = self.world.mean(self.state.sums).tolist()
        if not all(map(math.isfinite, sums)):
            good = min(self.world.gather(int(self.state.sums[-1])))
            self.state.step += good - self.window
            raise nonfinite_error(self.prepared, self.state.step, self.num_steps)
        return sums

    # --- what is due between steps ---------------------------------------------------------------

    def _evaluation_is_due(self) -> bool:
        epoch, begun = divmod(self.state.step, self.steps_per_epoch)
        due = epoch % self.recipe.train.eval_every == 0 or self.state.step == self.num_steps
        return epoch > 0 and not begun and due and self.state.evaluated_at != self.state.step

    def evaluate(self) -> None:
        """Evaluate and export the student; an error ends the run, with its state as before."""
        begun = time.perf_counter()
        try:
            with memory_errors("in an evaluation", SMALLER_EVALUATION):
                refuse_nonfinite(self.state.pack()[0])
                self._evaluate()
        except NonFiniteError:  # such a state is not worth saving
            raise
        except UserError as error:
            if self.world.size > 1 and not error.agreed:  # one process alone cannot save
                raise
            self.ending = error
        self.speed.pause(time.perf_counter() - begun)

    def _evaluate(self) -> None:
        state = self.state
        model = self.prepared.student if state.ema is None else state.ema.module
        # BatchNorm statistics differ between processes: the first one's are saved.
        self.world.take_from_main(model.buffers())
        try:
            scores, score, best = self._score(model), [0.0], False
        except Stopped:
            self.ending = self._preempted()
            return
        if scores is not None:
            if "top1" in scores:
                score = [scores["top1"], -scores["nll"]]
                best = state.best is None or score > state.best
            self.display.evaluation(state.step, scores, best)
        with self.world.together():
            if self.report is not None:
                self.report.evaluation(model, state.step, scores, best)
        # From here on it counts: a failure before leaves the run as it was.
        if scores is not None:
            state.scores = scores
            if best:
                state.best, state.best_step = score, state.step
        state.evaluated_at, self.unsaved = state.step, True

    def _score(self, model: nn.Module) -> dict[str, float] | None:
        """Evaluate the student on the validation images, if any; `Stopped` if asked to stop."""
        loaders, numbers = self.prepared.loaders, count(1)

        def stop() -> bool:  # asked before every batch
            self.display.working(f"evaluating, batch {next(numbers)}")
            return bool(self.stop)

        how = self.world, self.prepared.amp_dtype, stop
        if loaders.val is None:
            return None
        if loaders.bank is None:
            return evaluate(model, loaders.val, *how)
        return knn_evaluation(model, loaders.bank, loaders.val, *how)

    def log(self) -> None:
        """Show and write the means since the last log line."""
        state = self.state
        *sums, number = self._read()
        means = {name: total / number for name, total in zip(self.names, sums, strict=True)}
        scale = {}
        if state.scaler is not None:
            scale = {"loss_scale": state.scaler.get_scale()}
            if skipped := round(means.pop(SKIPPED) * number):
                scale[SKIPPED] = skipped
                self.say(
                    f"{plural(skipped, 'step')} of {number:.0f} without an update: a gradient"
                    f" overflowed float16, and the loss scale is {scale['loss_scale']:g} now"
                )
        state.sums.zero_()
        self.window = 0
        rate = max(float(group["lr"]) for group in state.optimizer.param_groups)
        self.speed.read(self.feed.waited)
        self.feed.waited = 0.0
        self.display.step(state.step, means, rate, self.speed)
        with self.world.together():
            if self.report is not None:
                self.report.training(state.step, {"lr": rate, **means, **scale}, self.speed)

    # --- saving and leaving ----------------------------------------------------------------------

    def save(self) -> None:
        begun = time.perf_counter()
        self.display.working("saving")
        self._read()
        states.save(self.state, self.prepared, self.folder)
        self.unsaved = False
        self.speed.pause(time.perf_counter() - begun)

    def _preempted(self) -> Preempted:
        place = f"step {self.state.step} of {self.num_steps}, state saved in {self.output}"
        what = f"stopped by {self.stop.name or 'another process'} at {place}"
        return agreed(Preempted(what, "the same command resumes it"))

    def _leave(self, ending: UserError) -> NoReturn:
        """Save what was learnt, and raise the error that all processes met."""
        step = f"step {self.state.step} of {self.num_steps}"
        if self.unsaved and isinstance(ending, Preempted):
            self.save()
        elif self.unsaved:
            with suppress(UserError):  # the first error is the one to raise
                self.save()
                self.say(f"the state of {step} is saved in {self.output}")
        raise ending

    def _summarise(self) -> dict[str, Any]:
        """Write the main process's summary, and return it on every process."""
        state, best_at = self.state, self.state.best_step
        summary = {
            "steps": self.num_steps,
            "epochs": self.recipe.train.epochs,
            "scores": state.scores,
            "best_top1": None if state.best is None else state.best[0],
            "best_epoch": best_at / self.steps_per_epoch if best_at >= 0 else None,
            "teachers": {name: p.accuracy for name, p in self.prepared.proofs.items()},
            "seconds": state.seconds,
            "processes": self.world.size,
        }
        with self.world.together():
            if self.world.is_main:
                write_atomic(self.output / SUMMARY, json.dumps(summary, indent=2).encode())
        return self.world.gather(summary)[0]
