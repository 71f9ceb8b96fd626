"""The training loop: one for one process or many, and every way it can stop."""

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import durable
from ..data import keyed
from ..data.loader import Batch, EvalLoader
from ..errors import ConfigError, DataError, NonFiniteError, Preempted, UserError
from ..export import export_timm
from ..metrics import Metrics
from ..recipe import Recipe, fingerprint
from ..teacher import Teacher
from ..vit import Needs, run_vit
from . import checkpoint
from .display import Display, Speed
from .distributed import World, world
from .job import Job, prepare
from .optim import clip_gradients, learning_rate, make_optimizer, make_schedule
from .run_folder import METRICS, TIMING, RunFolder, check_folder

PROGRESS = ("step", "evaluated_at", "best", "best_step")


class StopRequest:
    """SIGTERM, Ctrl-C and SIGUSR1 ask the run to save and stop; a second one stops it at once."""

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.name:
            for again, handler in self._before.items():
                signal.signal(again, handler)
            signal.raise_signal(number)
        self.name = signal.Signals(number).name


def train(
    recipe: Recipe,
    output: str | Path,
    *,
    device: str = "auto",
    console: Console | None = None,
    prepared: Callable[[Job], None] | None = None,
) -> dict[str, Any]:
    """Train the recipe's student into the run folder ``output``, or resume the run that is there.

    Returns the run's summary (also in ``summary.json``).

    Raises:
        UserError: one sentence; before the run folder is touched for everything that can be known before.
        Preempted: it was asked to stop, and has saved its state.
    """
    output = Path(output)
    console = console or Console()
    with world(device) as here:
        say = (lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)) if here.is_main else (lambda text: None)
        exists = check_folder(output, recipe)
        if exists and (output / "summary.json").is_file():
            summary = json.loads((output / "summary.json").read_bytes())
            say(f"{output} is finished already: nothing to do")
            return dict(summary)
        job = prepare(recipe, here, say)
        resumed = _load(output, job, say) if exists else None
        if prepared is not None and here.is_main:
            prepared(job)
        folder, error = None, None
        if here.is_main:
            try:
                folder = RunFolder(output, recipe)
            except UserError as refused:
                error = refused
        here.share(error)
        with folder or contextlib.nullcontext():
            return _Run(job, output, folder, console, resumed).finish()


def _load(output: Path, job: Job, say: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest verified training state, damaged ones named; None if the run had not saved any."""
    found = checkpoint.latest(output, warn=say)
    if found is None:
        return None
    tensors, state = checkpoint.load(found)
    if state["recipe"] != fingerprint(job.recipe):
        raise DataError(f"{found} was saved by another recipe than {output / 'recipe.yaml'}: restore the recipe, or start a new run")
    for key, name in (("train_images", "training images"), ("val_images", "validation images"), ("pipeline", "image pipeline")):
        if state["identity"][key] != job.identity[key]:
            raise DataError(
                f"the {name} are not those this run began with ({key} {state['identity'][key][:12]} then, {job.identity[key][:12]} now): "
                f"restore them, or start a new run in another folder"
            )
    return tensors, state


class _Run:
    """The state of a running run, and its loop."""

    def __init__(
        self,
        job: Job,
        output: Path,
        folder: RunFolder | None,
        console: Console,
        resumed: tuple[dict[str, Tensor], dict[str, Any]] | None,
    ) -> None:
        recipe = job.recipe
        self.job, self.output, self.folder, self.recipe = job, output, folder, recipe
        self.world: World = job.world
        self.steps_per_epoch = job.train_loader.steps_per_epoch
        self.total_steps = self.steps_per_epoch * recipe.train.epochs
        self.optimizer = make_optimizer(job.distillation, recipe.optim)
        self.schedule = make_schedule(self.optimizer, recipe.optim, recipe.train.epochs, self.steps_per_epoch)
        decay = recipe.train.ema_decay
        self.ema = None if decay is None else ModelEmaV3(job.student, decay=decay)
        scaled = job.amp_dtype is torch.float16
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=scaled) if scaled else None
        self.names = [*job.plan.objectives, "loss", "grad_norm"]
        self.sums = torch.zeros(len(self.names) + 1, dtype=torch.float64, device=self.world.device)  # last: steps summed
        self.step, self.evaluated_at, self.best, self.best_step = 0, -1, -math.inf, -1
        self.scores: dict[str, float] = {}
        self.seconds = 0.0
        offsets: dict[str, int] = {}
        if resumed is not None:
            offsets = self._restore(*resumed)
        self.module: nn.Module = job.distillation
        if self.world.size > 1:
            ids = [self.world.device.index] if self.world.device.type == "cuda" else None
            self.module = DistributedDataParallel(job.distillation, device_ids=ids, find_unused_parameters=bool(job.unused))
        self.display = Display(console, self.total_steps, self.steps_per_epoch, self.world.is_main)
        self.speed = Speed(recipe.train.batch_size)
        self.board = None
        if folder is not None:
            folder.open_logs(offsets)
            self.board = _tensorboard(output / "tensorboard", self.step)
            if resumed is not None:
                self.display.say(f"resuming {output} at step {self.step} of {self.total_steps}")

    @property
    def model(self) -> nn.Module:
        """The weights that are evaluated and exported: the moving average if there is one."""
        return self.ema.module if self.ema is not None else self.job.student

    # --- the loop --------------------------------------------------------------------------------------------------------------

    def finish(self) -> dict[str, Any]:
        """Train to the end, or until asked to stop."""
        train = self.recipe.train
        save_every = train.save_every or self.steps_per_epoch
        batches: Iterator[tuple[Batch, ...]] = iter(self.job.train_loader.batches(self.step, self.total_steps - self.step))
        saved_at = self.step
        begun = time.perf_counter() - self.seconds
        with StopRequest() as stop, self.display:
            while True:
                end_of_epoch = self.step > 0 and self.step % self.steps_per_epoch == 0
                due = end_of_epoch and (self.step // self.steps_per_epoch % train.eval_every == 0 or self.step == self.total_steps)
                stopped = False
                if due and self.evaluated_at != self.step:
                    stopped = not self._evaluate(stop)
                stopped = stopped or self.world.any(torch.tensor([bool(stop.name)], device=self.world.device))[0]
                self.seconds = time.perf_counter() - begun
                if saved_at != self.step and (stopped or self.step % save_every == 0 or self.step == self.total_steps):
                    self._save()
                    saved_at = self.step
                if self.step == self.total_steps and not stopped:
                    break
                if stopped:
                    raise Preempted(
                        f"stopped by {stop.name or 'another process'} at step {self.step} of {self.total_steps}, state saved in "
                        f"{self.output}: the same command resumes it"
                    )
                self._step(next(batches))
                self.speed.tick()
                if self.step % train.log_every == 0 or self.step % self.steps_per_epoch == 0:
                    self._log()
        return self._summarise()

    def _step(self, micro_batches: tuple[Batch, ...]) -> None:
        """One optimizer step; raises `NonFiniteError` before it is applied if a loss or a gradient is not finite."""
        job, count = self.job, len(micro_batches)
        job.distillation.train()
        self.schedule(self.step)
        self.optimizer.zero_grad()
        for i, batch in enumerate(micro_batches):
            # Dropout and stochastic depth draw from a generator seeded by the step: a resumed run needs no generator state.
            torch.manual_seed(int(keyed.keys(self.recipe.train.seed, self.step, i * self.world.size + self.world.rank, keyed.Stream.DROPOUT)[0]) >> 1)
            last = i == count - 1
            sync = contextlib.nullcontext() if last or self.world.size == 1 else self.module.no_sync()  # type: ignore[operator]
            with sync:
                with torch.autocast(self.world.device.type, job.amp_dtype, enabled=job.amp_dtype is not None):
                    losses = self.module(batch, job.teachers)
                total = losses["loss"] / count
                (self.scaler.scale(total) if self.scaler is not None else total).backward()
            values = torch.stack([losses[name].detach() for name in self.names[:-1]])
            self.sums[: len(values)] += values / count
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(job.distillation, self.recipe.optim.clip_grad)
        bad_loss = ~values.isfinite().all()
        bad_grad = ~norm.isfinite()
        if self.scaler is None:
            bad_loss = bad_loss | bad_grad
        if self.world.any(bad_loss.reshape(1))[0]:
            raise NonFiniteError(self._what_is_not_finite(micro_batches))
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.sums[-2] += norm
        self.sums[-1] += 1
        self.step += 1
        if self.ema is not None:
            self.ema.update(job.student, step=self.step)

    @torch.no_grad()
    def _what_is_not_finite(self, micro_batches: tuple[Batch, ...]) -> str:
        """The sentence that names the term, the step and the last good checkpoint."""
        job, culprit = self.job, ""
        for batch in micro_batches:
            for name, teacher in job.teachers.items():
                logits = teacher(batch.images, Needs(logits=True)).logits
                if logits is not None and not bool(logits.isfinite().all()):
                    culprit = f"the answer of the {name}"
            if not culprit:
                losses = job.distillation(batch, job.teachers)
                bad = [name for name in job.plan.objectives if not bool(losses[name].isfinite())]
                if bad:
                    culprit = f"the loss {bad[0]!r}"
            if culprit:
                break
        if not culprit:
            named = [name for name, p in job.distillation.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
            culprit = f"the gradient of {named[0]}" if named else "the loss on another process"
        folder = self.output / "checkpoints"
        good = sorted(path.name for path in folder.glob("step-*")) if folder.is_dir() else []
        kept = f"the last good checkpoint is {folder / good[-1]}" if good else "no checkpoint had been saved yet"
        first = micro_batches[0].ids[:4].tolist()
        return (
            f"{culprit} is NaN or infinite at step {self.step} (samples {first}...); the step was not applied, and {kept}: "
            "lower --lr, clip gradients with --clip-grad, or use --amp-dtype float32"
        )

    # --- what is due between steps ------------------------------------------------------------------------------------------------

    def _log(self) -> None:
        sums = self.world.mean(self.sums)
        steps = float(sums[-1])
        if steps == 0:
            return
        losses = dict(zip(self.names, (sums[:-1] / steps).tolist(), strict=True))
        self.sums.zero_()
        lr = learning_rate(self.optimizer)
        self.speed.read(self.job.train_loader.wait_seconds)
        self.job.train_loader.wait_seconds = 0.0
        self.display.step(self.step, losses, lr, self.speed)
        if self.folder is None:
            return
        record = {"kind": "train", "step": self.step, "epoch": self.step / self.steps_per_epoch, "lr": lr, **losses}
        self.folder.log(METRICS, record)
        if math.isfinite(self.speed.images_per_second):
            rate = {"images_per_second": round(self.speed.images_per_second, 1), "wait_share": round(self.speed.wait_share, 4)}
            self.folder.log(TIMING, {"step": self.step, **rate})
            self._scalars("speed", rate)
        self._scalars("train", {"lr": lr, **losses})

    def _scalars(self, group: str, values: dict[str, float]) -> None:
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(f"{group}/{name}", value, self.step)

    def _evaluate(self, stop: StopRequest) -> bool:
        """Evaluate, and write the student's weights; False if it was abandoned because the run shall stop."""
        job, begun = self.job, time.perf_counter()
        best = False
        if job.val_loader is not None:
            self.display.working("evaluating")
            asked = (lambda: bool(stop.name)) if self.world.size == 1 else None
            scores = evaluate(self.model, job.val_loader, self.world.device, job.amp_dtype, asked)
            if scores is None:
                return False
            self.scores = scores
            best = scores["top1"] > self.best
            if best:
                self.best, self.best_step = scores["top1"], self.step
            self.display.evaluation(self.step, scores, best)
            if self.folder is not None:
                self.folder.log(METRICS, {"kind": "eval", "step": self.step, "epoch": self.step / self.steps_per_epoch, **scores})
                self._scalars("validation", scores)
        if self.folder is not None:
            self._export("last")
            if best:
                self._export("best")
        self.evaluated_at = self.step
        self.speed.pause(time.perf_counter() - begun)
        return True

    def _export(self, name: str) -> None:
        job = self.job
        architecture, args = job.architecture
        export_timm(
            self.model,
            self.output / name,
            architecture=architecture,
            model_args=args,
            classes=job.classes or None,
            input_spec=job.student_spec,
        )

    # --- saving and restoring -----------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        error: UserError | None = None
        begun = time.perf_counter()
        sums = self.world.mean(self.sums)
        if self.folder is not None:
            self.display.working("saving")
            optimizer, structure = checkpoint.pack_optimizer(self.optimizer.state_dict())
            tensors = {f"distillation.{key}": value for key, value in self.job.distillation.state_dict().items()}
            if self.ema is not None:
                tensors |= {f"ema.{key}": value for key, value in self.ema.module.state_dict().items()}
            tensors |= optimizer | {"log.sums": sums}
            state = {name: getattr(self, name) for name in PROGRESS}
            if not math.isfinite(self.best):
                state["best"] = None
            state |= {
                "optimizer": structure,
                "scaler": self.scaler.state_dict() if self.scaler is not None else None,
                "scores": self.scores,
                "seconds": self.seconds,
                "offsets": self.folder.offsets(),
                "recipe": fingerprint(self.recipe),
                "identity": self.job.identity,
                "world_size": self.world.size,
            }
            try:
                checkpoint.save(self.output, self.step, tensors, state, keep=self.recipe.train.keep_checkpoints)
            except UserError as failed:
                error = failed
        self.world.share(error)
        self.speed.pause(time.perf_counter() - begun)

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> dict[str, int]:
        def under(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

        self.job.distillation.load_state_dict(under("distillation."))
        if self.ema is not None:
            self.ema.module.load_state_dict(under("ema."))
        self.optimizer.load_state_dict(checkpoint.unpack_optimizer(tensors, state["optimizer"]))
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.sums.copy_(tensors["log.sums"])
        for name in PROGRESS:
            setattr(self, name, state[name])
        if self.best is None:
            self.best = -math.inf
        self.scores, self.seconds = state["scores"], state["seconds"]
        return dict(state["offsets"])

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
        error: UserError | None = None
        if self.folder is not None:
            try:
                durable.write_atomic(self.output / "summary.json", json.dumps(summary, indent=2).encode())
            except UserError as failed:
                error = failed
            if self.board is not None:
                self.board.close()
        self.world.share(error)
        return summary


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: EvalLoader,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
    stop: Callable[[], bool] | None = None,
    teacher: Teacher | None = None,
) -> dict[str, float] | None:
    """Exact metrics over all processes, every image once; None if ``stop`` said so on the way."""
    training = model.training
    model.eval()
    metrics = Metrics(device)
    for batch in loader:
        if stop is not None and stop():
            model.train(training)
            return None
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = run_vit(model, batch.images, Needs(logits=True)).logits
            answer = None if teacher is None else teacher(batch.images, Needs(logits=True)).logits
        assert logits is not None
        metrics.update(logits.float(), batch.labels, None if answer is None else answer.float())
    model.train(training)
    metrics.merge_across_processes()
    return metrics.compute()


def _tensorboard(path: Path, step: int) -> Any:
    """A TensorBoard writer if the extra is installed; else None (metrics.jsonl holds everything)."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(path), purge_step=step)


__all__ = ["ConfigError", "StopRequest", "evaluate", "train"]
