"""The training loop: one for one process or many, and every way it can stop.

A step is a straight line: forward and backward of its micro-batches, the next step's batches
fetched while the device computes, one wait for the device to know that everything is finite, and
the optimizer. Samples, views and the order of both depend on the recipe alone. Dropout and
stochastic depth are drawn a micro-batch at a time, so their draws (and nothing else) also depend on
the number of processes and micro-batches.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from rich.console import Console
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import keyed
from ..data.batch import Batch
from ..data.loader import EvalLoader
from ..distill.teacher import Teacher, setting
from ..errors import DataError, Give, NonFiniteError, Preempted, Set, UserError
from ..evaluate.features import Stopped, batches_together, knn_evaluation
from ..evaluate.metrics import Metrics
from ..memory import SMALLER_EVALUATION, memory_errors
from ..messages import plural
from ..methods.base import Objective
from ..recipes.config import Recipe
from ..recipes.fingerprint import fingerprint
from ..storage import checkpoint
from ..storage.atomic import require_free, write_atomic
from ..storage.optimizer import pack_optimizer, unpack_optimizer
from ..vit.needs import Needs
from ..vit.output import ViTOutput
from ..vit.walk import run_vit
from ..weights.export import export_timm
from ..world import World, agreed, join_world
from .display import Display, Speed
from .folder import METRICS, PICTURES, SUMMARY, TIMING, RunFolder, finished, saved_recipe
from .optim import clip_gradients, gradient_norm, learning_rate, make_optimizer, make_schedule
from .pictures import draw_sheet, png
from .prepare import Prepared, prepare
from .stop import StopRequest
from .stored import with_views_of_labels

PROGRESS = ("step", "evaluated_at", "best_step", "scores", "seconds")
Resumed = tuple[dict[str, Tensor], dict[str, Any]]


def train(
    recipe: Recipe,
    output: str | Path,
    *,
    device: str = "auto",
    console: Console | None = None,
    prepared: Callable[[Prepared], None] | None = None,
) -> dict[str, Any]:
    """Train the recipe's student into the run folder ``output``, or resume the run that is there.

    Returns the run's summary (also in ``summary.json``); ``prepared`` is called on the main process
    before the first step.

    Raises:
        UserError: one sentence, the same on every process; before the run folder is touched for
            everything that can be known before.
        Preempted: it was asked to stop, and has saved its state.
    """
    output = Path(output)
    console = console or Console()
    recipe = with_views_of_labels(recipe, saved_recipe(output))
    with join_world(device) as here:
        say = (
            (lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True))
            if here.is_main
            else (lambda text: None)
        )

        def done() -> dict[str, Any] | None:
            summary = finished(output, recipe)
            if summary is not None:
                say(f"{output} is finished already: nothing to do")
            return summary

        summary = here.from_main(done)
        if summary is not None:
            return summary
        job = prepare(recipe, here, say)
        with here.together():
            if here.is_main:
                require_free(output, _bytes_to_write(job))
                if prepared is not None:
                    prepared(job)
        folder = None
        with contextlib.ExitStack() as stack:
            with here.together():
                if here.is_main:
                    folder = stack.enter_context(RunFolder(output, recipe))
            # Until the folder was this process's own, another one may have worked on the same run.
            summary = here.from_main(done)
            return (
                summary if summary is not None else _Run(job, output, folder, console, say).finish()
            )


def _bytes_to_write(job: Prepared) -> int:
    """What a run has to find room for: two training states (weights, the optimizer's two moments,
    the average) and two exports.
    """
    size = sum(
        value.numel() * value.element_size() for value in job.distillation.state_dict().values()
    )
    states = 3 if job.recipe.train.ema_decay is None else 4
    return 2 * (states + 1) * size


class _Run:
    """The state of a running run, and its loop."""

    def __init__(
        self,
        job: Prepared,
        output: Path,
        folder: RunFolder | None,
        console: Console,
        say: Callable[[str], None],
    ) -> None:
        recipe = job.recipe
        self.job, self.output, self.folder, self.recipe, self.say = job, output, folder, recipe, say
        self.world: World = job.world
        self.fingerprint = fingerprint(recipe)
        self.steps_per_epoch = job.loaders.train.steps_per_epoch
        self.total_steps = self.steps_per_epoch * recipe.train.epochs
        self.names = [*job.plan.objectives, "loss", "grad_norm"]
        self.sums = torch.zeros(
            len(self.names) + 1, dtype=torch.float64, device=self.world.device
        )  # last: steps summed
        self.step, self.evaluated_at, self.best, self.best_step = 0, -1, -math.inf, -1
        self.scores: dict[str, float] = {}
        self.seconds = 0.0
        self.waited = 0.0
        loaded: checkpoint.State | None = None

        def newest() -> Path | None:
            nonlocal loaded
            found = checkpoint.load_latest(output, warn=say)
            if found is None:
                return None
            folder, loaded = found
            return folder

        found = self.world.from_main(newest)
        with self.world.together():
            self.optimizer = make_optimizer(job.distillation, recipe.optim)
            self.schedule = make_schedule(
                self.optimizer, recipe.optim, recipe.train.epochs, self.steps_per_epoch
            )
            decay = recipe.train.ema_decay
            self.ema = None if decay is None else ModelEmaV3(job.student, decay=decay)
            self.scaler = (
                torch.amp.GradScaler(self.world.device.type)
                if job.amp_dtype is torch.float16
                else None
            )
            offsets = (
                {} if found is None else self._restore(found, loaded or checkpoint.load(found))
            )
            if folder is not None:
                folder.open_logs(offsets)
                changed = folder.record_environment(self.step, self.world.size)
                if changed:
                    say(
                        f"this run goes on with {'; '.join(changed)}: same samples and views,"
                        " numbers may differ in their last bits"
                    )
        self.module: nn.Module = job.distillation
        if self.world.size > 1:
            ids = [self.world.device.index] if self.world.device.type == "cuda" else None
            self.module = DistributedDataParallel(
                job.distillation, device_ids=ids, find_unused_parameters=bool(job.unused)
            )
        self.display = Display(console, self.total_steps, self.steps_per_epoch, self.world.is_main)
        self.speed = Speed(recipe.train.batch_size)
        self.board = None if folder is None else _tensorboard(output / "tensorboard", self.step)
        if found is not None:
            say(f"resuming {output} at step {self.step} of {self.total_steps}")

    @property
    def model(self) -> nn.Module:
        """The weights that are evaluated and exported: the moving average if there is one."""
        return self.ema.module if self.ema is not None else self.job.student

    @property
    def progress(self) -> float:
        """The fraction of the run that is done."""
        return self.step / self.total_steps

    # --- the loop --------------------------------------------------------------------------------

    def finish(self) -> dict[str, Any]:
        """Train to the end, or until asked to stop."""
        train = self.recipe.train
        save_every = train.save_every or self.steps_per_epoch
        batches = self.job.loaders.train.batches(self.step, self.total_steps - self.step)
        saved_at, stopped = self.step, False
        begun = time.perf_counter() - self.seconds
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(StopRequest())
            stack.enter_context(self.display)
            stack.callback(batches.close)  # type: ignore[attr-defined]
            if self.board is not None:
                stack.callback(self.board.close)
            with self._memory_of_a_step():
                upcoming, failure = self._fetch(batches)
            failure, self.waited = self.world.settle(failure), 0.0
            while True:
                end_of_epoch = self.step > 0 and self.step % self.steps_per_epoch == 0
                due = end_of_epoch and (
                    self.step // self.steps_per_epoch % train.eval_every == 0
                    or self.step == self.total_steps
                )
                if failure is None and due and self.evaluated_at != self.step:
                    stopped, failure = self._evaluate_or_fail(stop, stopped)
                    saved_at = -1
                self.seconds = time.perf_counter() - begun
                if failure is not None:
                    self._give_up(failure, saved_at)
                if saved_at != self.step and (
                    stopped or self.step % save_every == 0 or self.step == self.total_steps
                ):
                    self._save()
                    saved_at = self.step
                if stopped:
                    error = Preempted(
                        f"stopped by {stop.name or 'another process'} at step {self.step} of"
                        f" {self.total_steps}, state saved in {self.output}: the same command"
                        " resumes it"
                    )
                    raise agreed(error)
                if self.step == self.total_steps:
                    return self._summarise()
                assert upcoming is not None
                with self._memory_of_a_step():
                    upcoming, stopped, failure = self._step(upcoming, batches, stop)
                self.speed.tick()
                if self.step % train.log_every == 0 or self.step % self.steps_per_epoch == 0:
                    self._log()

    def _step(
        self,
        micro_batches: tuple[Batch, ...],
        batches: Iterator[tuple[Batch, ...]],
        stop: StopRequest,
    ) -> tuple[tuple[Batch, ...] | None, bool, UserError | None]:
        """One optimizer step; returns the next step's batches, whether any process was asked to
        stop, and what prevents those batches.

        Raises:
            NonFiniteError: a loss or a gradient is NaN or infinite; the step was not applied.
        """
        job, count = self.job, len(micro_batches)
        job.distillation.train()
        self.schedule(self.step)
        self.optimizer.zero_grad()
        finite = torch.ones((), dtype=torch.bool, device=self.world.device)
        for i, batch in enumerate(micro_batches):
            sync = (
                contextlib.nullcontext()
                if i == count - 1 or self.world.size == 1
                else self.module.no_sync()  # type: ignore[operator]
            )
            with sync:
                with self._as_in_step(i):
                    losses = self.module(batch, job.teachers, self.progress)
                total = losses["loss"] / count
                (self.scaler.scale(total) if self.scaler is not None else total).backward()
            values = torch.stack([losses[name].detach() for name in self.names[:-1]])
            finite &= values.isfinite().all()
            self.sums[: len(values)] += values / count
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = gradient_norm(job.distillation)
        upcoming, failure = self._fetch(batches)
        # float16 gradients overflow now and then, and the scaler leaves such a step out; with its
        # scale used up they are not finite.
        if self.scaler is None or self.scaler.get_scale() < 1:
            finite &= norm.isfinite()
        not_finite, stopped, failed = self.world.any(
            not bool(finite), bool(stop.name), failure is not None
        )
        if not_finite:
            raise agreed(NonFiniteError(self._what_is_not_finite(micro_batches)))
        if failed:
            failure = self.world.settle(failure)
        clip_gradients(job.distillation, self.recipe.optim.clip_grad, norm)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.sums[-2] += torch.where(norm.isfinite(), norm, 0)
        self.sums[-1] += 1
        self.step += 1
        if self.ema is not None:
            self.ema.update(job.student, step=self.step)
        return upcoming, stopped, failure

    def _memory_of_a_step(self) -> contextlib.AbstractContextManager[None]:
        train = self.recipe.train
        where = (
            "in a training step of"
            f" {plural(train.batch_size // (train.accumulate * self.world.size), 'image')} at once"
        )
        less = (
            f"--accumulate above {train.accumulate} or --batch-size below {train.batch_size} (and"
            " --lr in proportion)"
        )
        return memory_errors(where, f"start again in another --output with {less}")

    @contextlib.contextmanager
    def _as_in_step(self, micro_batch: int) -> Iterator[None]:
        """The precision and the random draws of a micro-batch's forward pass.

        Dropout and stochastic depth draw from a generator seeded by the step, so that a resumed run
        needs no generator state.
        """
        place = micro_batch * self.world.size + self.world.rank
        torch.manual_seed(
            int(keyed.keys(self.recipe.train.seed, self.step, place, keyed.Stream.DROPOUT)[0]) >> 1
        )
        amp_dtype = self.job.amp_dtype
        with torch.autocast(self.world.device.type, amp_dtype, enabled=amp_dtype is not None):
            yield

    def _fetch(
        self, batches: Iterator[tuple[Batch, ...]]
    ) -> tuple[tuple[Batch, ...] | None, UserError | None]:
        """The next step's batches (None: there is none) or the error of this process that prevents
        them.
        """
        working = None
        if self.world.device.type == "cuda":
            working = torch.cuda.Event()
            working.record()
        begun = time.perf_counter()
        try:
            return next(batches, None), None
        except UserError as error:
            return None, error
        finally:
            # A GPU that is still busy has not waited for data, however long the host did.
            if working is None or working.query():
                self.waited += time.perf_counter() - begun

    def _what_is_not_finite(self, micro_batches: tuple[Batch, ...]) -> str:
        """The sentence that names the term, the step and the last good checkpoint; for all
        processes to say.
        """
        found = [
            culprit for culprit in self.world.gather(self._culprit(micro_batches)) if culprit
        ] or ["the loss"]
        # One process's loss is in everybody's gradients: the cause comes first.
        first = min(found, key=lambda culprit: culprit.startswith("the gradient"))
        remedy = "lower --lr, clip gradients with --clip-grad, or use --amp-dtype float32"
        if first.startswith("the answer"):
            name = first.removeprefix("the answer of the ").partition(" ")[0]
            remedy = f"check its weights, or use {setting(name, 'precision', 'float32')}"
        return (
            f"{first} is NaN or infinite at step {self.step}; the step was not applied, and"
            f" {self._last_good()}: {remedy}"
        )

    @torch.no_grad()
    def _culprit(self, micro_batches: tuple[Batch, ...]) -> str:
        """What was the first not to be finite in this process's part of the step, found by
        repeating its forward passes.
        """
        job = self.job
        for i, batch in enumerate(micro_batches):
            samples = f"(samples {', '.join(map(str, batch.ids[:4].tolist()))}, ...)"
            with self._as_in_step(i):
                _, answers = job.distillation.answer(batch, job.teachers)
            for name, answer in answers.items():
                if isinstance(answer, ViTOutput) and not all(
                    bool(recorded.isfinite().all()) for recorded in answer.tensors()
                ):
                    return f"the answer of the {name} {samples}"
            with self._as_in_step(i):
                losses = job.distillation(batch, job.teachers, self.progress)
            for name in self.names[:-1]:
                if not bool(losses[name].isfinite()):
                    return f"the loss {name!r} {samples}"
        for name, parameter in job.distillation.named_parameters():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                return f"the gradient of {name}"
        return ""

    def _last_good(self) -> str:
        folder = self.output / "checkpoints"
        good = sorted(path.name for path in folder.glob("step-*")) if folder.is_dir() else []
        return (
            f"the last good checkpoint is {folder / good[-1]}"
            if good
            else "no checkpoint had been saved yet"
        )

    # --- what is due between steps ---------------------------------------------------------------

    def _log(self) -> None:
        sums = self.world.mean(self.sums)
        means = dict(zip(self.names, (sums[:-1] / sums[-1]).tolist(), strict=True))
        self.sums.zero_()
        lr = learning_rate(self.optimizer)
        self.speed.read(self.waited)
        self.waited = 0.0
        self.display.step(self.step, means, lr, self.speed)
        with self.world.together():
            if self.folder is None:
                return
            record = {
                "kind": "train",
                "step": self.step,
                "epoch": self.step / self.steps_per_epoch,
                "lr": lr,
                **means,
            }
            if self.scaler is not None:
                record["loss_scale"] = self.scaler.get_scale()
            self.folder.log(METRICS, record)
            self._scalars("train", {"lr": lr, **means})
            if math.isfinite(self.speed.images_per_second):
                rate = {
                    "images_per_second": round(self.speed.images_per_second, 1),
                    "wait_share": round(self.speed.wait_share, 4),
                }
                self.folder.log(TIMING, {"step": self.step, **rate})
                self._scalars("speed", rate)

    def _scalars(self, group: str, values: dict[str, float]) -> None:
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(f"{group}/{name}", value, self.step)

    def _evaluate_or_fail(self, stop: StopRequest, stopped: bool) -> tuple[bool, UserError | None]:
        """Evaluate; returns whether the run shall stop, and the error that prevented the
        evaluation, with the run's state as before it.

        Raises:
            NonFiniteError: the state is not worth saving.
            UserError: of this process alone, so that none can save.
        """
        try:
            with memory_errors("in an evaluation", SMALLER_EVALUATION):
                return not self._evaluate(stop) or stopped, None
        except UserError as error:
            if isinstance(error, NonFiniteError) or (self.world.size > 1 and not error.agreed):
                raise
            return stopped, error

    def _evaluate(self, stop: StopRequest) -> bool:
        """Evaluate, and write the student's weights; False if it was abandoned because the run
        shall stop.
        """
        job, begun = self.job, time.perf_counter()
        best, scores = False, None
        if job.loaders.val is not None:
            self.display.working("evaluating")
            try:
                scores = self._scores_now(job.loaders.val, lambda: bool(stop.name))
            except NonFiniteError as error:
                raise agreed(
                    NonFiniteError(
                        f"evaluation at step {self.step}: {error} {self._last_good().capitalize()}."
                    )
                ) from error
            if scores is None:
                return False
            best = scores.get("top1", -math.inf) > self.best
            self.display.evaluation(self.step, scores, best)
            self.display.working("")
        with self.world.together():
            if self.folder is not None:
                for name in ("last", "best") if best else ("last",):
                    self._export(name)
                self._draw()
                if scores is not None:
                    self.folder.log(
                        METRICS,
                        {
                            "kind": "eval",
                            "step": self.step,
                            "epoch": self.step / self.steps_per_epoch,
                            **scores,
                        },
                    )
                    self._scalars("validation", scores)
        # From here on it counts: what fails before leaves the run as it was.
        if scores is not None:
            self.scores = scores
            if best:
                self.best, self.best_step = scores["top1"], self.step
        self.evaluated_at = self.step
        self.speed.pause(time.perf_counter() - begun)
        return True

    def _scores_now(self, images: EvalLoader, stop: Callable[[], bool]) -> dict[str, float] | None:
        """The accuracy of the classifier, or that of k-NN on the features of a student without one;
        None if it was abandoned.
        """
        job = self.job
        if job.loaders.bank is None:
            return evaluate(self.model, images, self.world, job.amp_dtype, stop)
        return knn_evaluation(self.model, job.loaders.bank, images, self.world, job.amp_dtype, stop)

    @torch.no_grad()
    def _draw(self) -> None:
        """What the objectives have to show of a few images, as a file and in TensorBoard."""
        job = self.job
        if all(
            type(objective).pictures is Objective.pictures
            for objective in job.plan.objectives.values()
        ):
            return
        for batch in job.loaders.shown:
            batch.seed = self.recipe.train.seed
            job.distillation.eval()
            with torch.autocast(
                self.world.device.type, job.amp_dtype, enabled=job.amp_dtype is not None
            ):
                rows = job.distillation.pictures(
                    batch
                )  # the student that the decoder is trained with, not its average
            if rows:
                sheet = draw_sheet(rows, job.networks.spec)
                write_atomic(self.output / PICTURES, png(sheet))
                if self.board is not None:
                    self.board.add_image("pictures", np.array(sheet), self.step, dataformats="HWC")

    def _export(self, name: str) -> None:
        job = self.job
        architecture, args = job.networks.architecture
        export_timm(
            self.model,
            self.output / name,
            architecture=architecture,
            model_args=args,
            classes=job.networks.classes or None,
            input_spec=job.networks.spec,
        )

    # --- saving and restoring --------------------------------------------------------------------

    def _give_up(self, failure: UserError, saved_at: int) -> NoReturn:
        """Save what was learnt, and raise the error that all processes met; it is the one to say,
        also where saving fails too.
        """
        if self.step > 0 and saved_at != self.step:
            with contextlib.suppress(UserError):
                self._save()
                self.say(
                    f"the state of step {self.step} of {self.total_steps} is saved in {self.output}"
                )
        raise failure

    def _save(self) -> None:
        begun = time.perf_counter()
        sums = self.world.gather(self.sums.tolist())
        with self.world.together():
            if self.folder is not None:
                self.display.working("saving")
                optimizer, structure = pack_optimizer(self.optimizer.state_dict())
                tensors = {
                    f"distillation.{key}": value
                    for key, value in self.job.distillation.state_dict().items()
                }
                if self.ema is not None:
                    tensors |= {
                        f"ema.{key}": value for key, value in self.ema.module.state_dict().items()
                    }
                state = {name: getattr(self, name) for name in PROGRESS}
                state |= {
                    "best": self.best if math.isfinite(self.best) else None,
                    "sums": sums,
                    "optimizer": structure,
                    "scaler": self.scaler.state_dict() if self.scaler is not None else None,
                    "offsets": self.folder.offsets(),
                    "recipe": self.fingerprint,
                    "identity": self.job.identity,
                }
                keep = self.recipe.train.keep_checkpoints
                checkpoint.save(self.output, self.step, tensors | optimizer, state, keep=keep)
                self.display.working("")
        self.speed.pause(time.perf_counter() - begun)

    def _restore(self, found: Path, saved: checkpoint.State) -> dict[str, int]:
        """Take over a checkpoint and return where its logs ended; refuse one of another recipe,
        other images or another teacher.
        """
        tensors, state = saved
        if state["recipe"] != self.fingerprint:
            raise DataError(
                f"{found} was saved by another recipe than that of {self.output}: restore the"
                " recipe, or start a new run"
            )
        for what, now in self.job.identity.items():
            then = str(state["identity"].get(what))
            if then == now:
                continue
            if what in self.job.images.sources and self.recipe.train.accept_changed_images:
                self.say(f"the {what} have changed since {found} was saved: accepted")
                continue
            accept = Set("train.accept_changed_images", True)
            raise DataError(
                f"the {what} of this run have changed since {found} was saved ({then[:12]} then,"
                f" {now[:12]} now)",
                ("restore them", Give("output"))
                + ((accept,) if what in self.job.images.sources else ()),
                field=what,
            )
        try:
            self._take_over(tensors, state)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(
                f"{found} does not fit this version's student and optimizer ({reason}): resume with"
                " the version it began with"
            ) from error
        return dict(state["offsets"])

    def _take_over(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        def under(prefix: str) -> dict[str, Tensor]:
            return {
                key.removeprefix(prefix): value
                for key, value in tensors.items()
                if key.startswith(prefix)
            }

        self.job.distillation.load_state_dict(under("distillation."))
        if self.ema is not None:
            self.ema.module.load_state_dict(under("ema."))
        self.optimizer.load_state_dict(unpack_optimizer(tensors, state["optimizer"]))
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        for name in PROGRESS:
            setattr(self, name, state[name])
        self.best = -math.inf if state["best"] is None else state["best"]
        # Each process goes on with its own sums; other processes than then share their mean.
        sums = torch.tensor(state["sums"], dtype=torch.float64)
        self.sums.copy_(sums[self.world.rank] if len(sums) == self.world.size else sums.mean(0))

    def _summarise(self) -> dict[str, Any]:
        summary = {
            "steps": self.total_steps,
            "epochs": self.recipe.train.epochs,
            "scores": self.scores,
            "best_top1": self.best if math.isfinite(self.best) else None,
            "best_epoch": self.best_step / self.steps_per_epoch if self.best_step >= 0 else None,
            "seconds": self.seconds,
            "processes": self.world.size,
        }

        def write() -> dict[str, Any]:
            write_atomic(self.output / SUMMARY, json.dumps(summary, indent=2).encode())
            return summary

        return self.world.from_main(write)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: EvalLoader,
    here: World,
    amp_dtype: torch.dtype | None = None,
    stop: Callable[[], bool] = lambda: False,
    teacher: Teacher | None = None,
) -> dict[str, float] | None:
    """Exact metrics over all processes, every image once; None if ``stop`` said so to one of them
    on the way.
    """
    training = model.training
    model.eval()
    metrics = Metrics(here.device)
    try:
        for batch in batches_together(loader, here, stop):
            with torch.autocast(here.device.type, amp_dtype, enabled=amp_dtype is not None):
                logits = run_vit(model, batch.images, Needs(logits=True)).logits
                answer = (
                    None if teacher is None else teacher(batch.images, Needs(logits=True)).logits
                )
            assert logits is not None
            metrics.update(logits.float(), batch.labels, None if answer is None else answer.float())
    except Stopped:
        return None
    finally:
        model.train(training)
    metrics.merge_across_processes()
    return metrics.compute()


def _tensorboard(path: Path, step: int) -> Any:
    """A TensorBoard writer if the extra is installed; else None (metrics.jsonl holds
    everything).
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(path), purge_step=step)
