"""Running a staged recipe: one run after the other, each in a folder of its own.

Every stage is an ordinary run: resumed, skipped once it is finished, evaluated and exported like
any other. It names earlier stages by their folders, and its ``identity.json`` knows their weights
by content.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ..data.loader import check_batches
from ..data.sources.open import open_source
from ..distill.step import Distillation
from ..errors import ConfigError, Fix, Give, Set, UserError
from ..messages import suggest
from ..recipes.config import Recipe
from ..recipes.stages import (
    PREFIX,
    STAGES,
    Stages,
    dump,
    foreseen,
    in_stage,
    sources,
    teaching,
    with_models,
)
from ..storage.atomic import disk_errors, write_atomic
from ..weights.files import check_is_file
from ..world import join_world
from .folder import check_folder, contents, first_of, saved_recipe
from .identity import SUMMARY, changes, has_learnt, read_identity
from .networks import Built, build_blank, check_has_weights, plan_of, without_memory
from .optim import make_optimizer
from .prepare import open_images
from .stored import open_labels, stored_network, with_views_of_labels
from .train import train


def train_stages(
    stages: Stages,
    output: str | Path,
    *,
    device: str = "auto",
    console: Console | None = None,
    prepared: Callable[[Any], None] | None = None,
    done: Callable[[str, Path, dict[str, Any]], None] | None = None,
    until: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Train the stages one after the other into folders of ``output`` and return their summaries.

    A finished stage is not repeated, a stopped one is resumed.

    Args:
        prepared: called on the main process before the first step of each stage that runs.
        done: called on the main process with a finished stage's name, folder and summary.
        until: the stage to stop after.

    Raises:
        UserError: as `vitdistill.runs.train.train`; before anything runs also for what is wrong
            with a later stage, and for a folder that holds a stage with other settings, weights or
            images.
    """
    output, console = Path(output), console or Console()
    stages = replace(stages, name=output.absolute().name or stages.name)
    keys = [*stages.stages]
    if until is not None and until not in keys:
        raise ConfigError(f"there is no stage {until!r}", fix=suggest(until, keys), field="stage")
    chosen = keys[: None if until is None else keys.index(until) + 1]

    def begin(job: Any) -> None:
        _save(stages, output)
        if prepared is not None:
            prepared(job)

    summaries = {}
    with join_world(device) as world:
        world.from_main(partial(_check, stages, chosen, output, world.size))
        for number, key in enumerate(chosen, 1):
            folder = output / stages.stages[key].name
            if world.is_main:
                console.print(
                    f"stage {key} ({number} of {len(keys)}): {folder}",
                    highlight=False,
                    markup=False,
                    soft_wrap=True,
                )
            with in_stage(key):
                # An earlier stage may have just been trained anew, and to other weights.
                world.from_main(partial(_check_stage, stages, key, output))
                summaries[key] = train(
                    resolved(stages, key, output),
                    folder,
                    device=device,
                    console=console,
                    prepared=begin,
                )
            if world.is_main and done is not None:
                done(key, folder, summaries[key])
        # If stages are left out and none ran, the folder may be of a recipe that has all.
        if chosen == keys:
            world.from_main(partial(_save, stages, output))
    return summaries


def resolved(stages: Stages, key: str, output: Path) -> Recipe:
    """Return a stage's recipe with the folders of earlier stages in place of their names."""
    recipe = stages.stages[key]
    folders = {
        path: str(output / stages.stages[source].name) for path, source in sources(recipe).items()
    }
    return with_models(recipe, folders)


def _save(stages: Stages, output: Path) -> None:
    text, path = dump(stages).encode(), output / STAGES
    if not path.is_file() or path.read_bytes() != text:
        write_atomic(path, text)


# --- before anything runs ------------------------------------------------------------------------


def _check(stages: Stages, chosen: list[str], output: Path, num_processes: int) -> None:
    """Raise what is known to be wrong with any of the chosen stages; write nothing."""
    with disk_errors(output):
        found = contents(output) if output.is_dir() else []
    foreign = sorted({*found} - {recipe.name for recipe in stages.stages.values()})
    if foreign and STAGES not in found:
        raise ConfigError(
            f"the output {output} is not empty ({foreign[0]} is in it) and holds no stages",
            fix=Give("output"),
            field="output",
        )
    for key in chosen:
        with in_stage(key):
            _check_stage(stages, key, output)
    pending = [key for key in chosen if not (output / stages.stages[key].name / SUMMARY).is_file()]
    if len(pending) > 1:  # a single one finds its own mistakes
        _check_ahead(stages, pending, num_processes)


def _check_stage(stages: Stages, key: str, output: Path) -> None:
    """Raise `ConfigError` if a stage's folder holds anything but this stage, as it is now."""
    folder, recipe = output / stages.stages[key].name, resolved(stages, key, output)
    saved = saved_recipe(folder)
    if saved is not None:
        recipe = with_views_of_labels(recipe, saved)
        lines = changes(folder, recipe)
        fixes: tuple[Fix, ...] = (Set("name"), Give("output"))
        if not lines and _has_other_images(folder, recipe):
            lines.append(f"the training images in {recipe.data.dir} are others than then")
            fixes = (Set("data.dir"), Set("train.accept_changed_images", True), *fixes)
        if lines:
            raise ConfigError(
                f"{folder} holds this stage as it was before ({first_of(lines)})",
                fix=fixes,
                field="name",
            )
    check_folder(folder, recipe)


def _has_other_images(folder: Path, recipe: Recipe) -> bool:
    """Whether a run has learnt from other images than the recipe names.

    Nothing is known where images are gone, which a finished run does not need.
    """
    then = read_identity(folder).get("training images")
    if then is None or not has_learnt(folder) or recipe.train.accept_changed_images:
        return False
    try:
        return open_source(recipe.data.dir, "train").fingerprint() != then
    except UserError:
        return False


def _check_ahead(stages: Stages, pending: list[str], num_processes: int) -> None:
    """Raise what the pending stages would end in once they begin, as far as it can be known."""
    num_classes: dict[str, int] = {}
    for key, stage in stages.stages.items():
        with in_stage(key):
            stores = open_labels(stage)
            stored = [stored_network(store, name).num_classes for name, store in stores.items()]
            recipe, student, teachers = networks_ahead(
                stages, key, max(stored, default=1000), num_classes
            )
            if key not in pending:
                continue
            described = {name: built.network for name, built in teachers.items()}
            plan = plan_of(recipe, student.network, described)
            if key == pending[0]:
                continue
            check_batches(
                open_images(stage).train,
                stage.data.augment,
                stage.train.batch_size,
                num_processes,
                stage.train.accumulate,
            )
            if stage.student.checkpoint:
                check_is_file(stage.student.checkpoint)
            for name, config in stage.teachers.items():
                if config.labels is None and not config.model.startswith(PREFIX):
                    check_has_weights(config, name)
            with without_memory():
                make_optimizer(Distillation(student.model, plan), stage.optim)


def networks_ahead(
    stages: Stages, key: str, num_classes: int, before: dict[str, int]
) -> tuple[Recipe, Built, dict[str, Built]]:
    """Build a stage's networks before any stage has run; also return the recipe they are of.

    ``before``: how many classes the students of earlier stages answer in; this stage's is added.
    """
    recipe = foreseen(stages, key)
    heads = {name: before[source] for name, source in teaching(stages.stages[key]).items()}
    with in_stage(key), without_memory():
        student, teachers = build_blank(recipe, num_classes, heads)
    before[key] = student.network.num_classes
    return recipe, student, teachers
