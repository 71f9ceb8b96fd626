"""Running a staged recipe: one run after the other, each in a folder of its own.

A stage is a run like any other. It names earlier ones by their folders, and its ``identity.json``
knows their weights by content.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..data.loader import check_batches
from ..distill.step import Distillation
from ..errors import ConfigError, Give, Set, Spell
from ..messages import suggest
from ..recipes.config import Recipe
from ..recipes.convert import replace_fields
from ..recipes.stages import (
    PREFIX,
    STAGES,
    Stages,
    foreseen,
    in_stage,
    sources,
    spell_in_stage,
)
from ..recipes.yaml import dump_recipe
from ..storage.atomic import disk_errors, write_atomic
from ..weights.files import check_is_file
from ..world import World, join_world
from .display import Display
from .folder import check_folder, contents, saved_recipe
from .identity import SUMMARY
from .networks import Built, build_blank, check_has_weights, plan_of
from .optim import make_optimizer
from .prepare import Prepared, loading_of, open_images
from .stored import open_labels, stored_network, with_views_of_labels
from .train import train


def train_stages(
    stages: Stages,
    output: str | Path,
    *,
    device: str = "auto",
    console: Console | None = None,
    spell: Spell = str,
    prepared: Callable[[Prepared], None] | None = None,
    done: Callable[[str, Path, dict[str, Any]], None] | None = None,
    until: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Train the stages one after the other into folders of ``output`` and return their summaries.

    Args:
        spell: as `train`.
        prepared: called on the main process before the first step of each stage that runs.
        done: called on the main process with a finished stage's name, folder and summary.
        until: the stage to stop after.

    Raises:
        UserError: as `train`; also, before anything runs, if a later stage is wrong or a folder
            holds a stage with other settings or weights.
    """
    output = Path(output)
    stages = replace(stages, name=output.absolute().name or stages.name)
    keys = [*stages.stages]
    if until is not None and until not in keys:
        raise ConfigError(f"there is no stage {until!r}", fix=suggest(until, keys), field="stage")
    chosen = keys if until is None else keys[: keys.index(until) + 1]

    def begin(run: Prepared) -> None:
        _save(stages, output)
        if prepared is not None:
            prepared(run)

    summaries = {}
    with join_world(device) as world:
        say = Display(console or Console(), world.is_main).say
        world.from_main(partial(_check, stages, chosen, output, world.size))
        for number, key in enumerate(chosen, 1):
            folder = output / stages.stages[key].name
            say(f"stage {key} ({number} of {len(keys)}): {folder}")
            with in_stage(key):
                recipe = resolved(stages, key, output)
                shown: Any = {"console": console, "spell": spell_in_stage(key, spell)}
                summaries[key] = train(recipe, folder, device=device, prepared=begin, **shown)
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
    return replace_fields(recipe, folders)


def _save(stages: Stages, output: Path) -> None:
    text, path = dump_recipe(stages).encode(), output / STAGES
    if not path.is_file() or path.read_bytes() != text:
        write_atomic(path, text)


# --- before anything runs ------------------------------------------------------------------------


def _check(stages: Stages, chosen: list[str], output: Path, num_processes: int) -> None:
    """Raise what is known to be wrong with any of the chosen stages; write nothing."""
    with disk_errors(output):
        found = contents(output) if output.is_dir() else []
    foreign = sorted({*found} - {recipe.name for recipe in stages.stages.values()})
    if foreign and STAGES not in found:
        what = f"the output {output} is not empty ({foreign[0]} is in it) and holds no stages"
        raise ConfigError(what, Give("output"))
    pending = []
    for key in chosen:
        folder, recipe = output / stages.stages[key].name, resolved(stages, key, output)
        with in_stage(key):
            check_folder(folder, with_views_of_labels(recipe, saved_recipe(folder)), Set("name"))
        if not (folder / SUMMARY).is_file():
            pending.append(key)
    if len(pending) > 1:  # a single one finds its own mistakes
        _check_ahead(stages, pending, num_processes)


def _check_ahead(stages: Stages, pending: list[str], num_processes: int) -> None:
    """Raise, as far as it can be known, what the pending stages would fail with."""
    num_classes: dict[str, int] = {}
    for key, stage in stages.stages.items():
        with in_stage(key):
            stores = open_labels(stage)
            stored = [stored_network(store, name).num_classes for name, store in stores.items()]
            most = max(stored, default=1000)
            recipe, student, teachers = networks_ahead(stages, key, most, num_classes)
            if key not in pending:
                continue
            plan = plan_of(recipe, student.network, {n: t.network for n, t in teachers.items()})
            if key == pending[0]:  # it begins at once and finds the rest itself
                continue
            world = World(0, num_processes, torch.device("cpu"))
            check_batches(open_images(stage).train, stage.data.augment, loading_of(stage, world))
            if stage.student.checkpoint:
                check_is_file(stage.student.checkpoint)
            for name, config in stage.teachers.items():
                if config.labels is None and not config.model.startswith(PREFIX):
                    check_has_weights(config, name)
            with torch.device("meta"):
                make_optimizer(Distillation(student.model, plan), stage.optim)


def networks_ahead(
    stages: Stages, key: str, num_classes: int, before: dict[str, int]
) -> tuple[Recipe, Built, dict[str, Built]]:
    """Return a stage's recipe and networks before any stage has run.

    ``before``: numbers of classes of earlier stages' students; this stage's is added.
    """
    recipe = foreseen(stages, key)
    named = sources(stages.stages[key]).items()
    heads = {
        path.split(".")[1]: before[source] for path, source in named if path.startswith("teachers.")
    }
    with in_stage(key), torch.device("meta"):
        student, teachers = build_blank(recipe, num_classes, heads)
    before[key] = student.network.num_classes
    return recipe, student, teachers
