"""Stages: recipes that run one after the other, where a later one starts from, or learns from, what
an earlier one trained.

Every stage is an ordinary run in a folder of its own: resumed, skipped when it is finished,
evaluated and exported like any other.
"""

import json
import os
import re
import string
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ..data.loader import check_batches
from ..data.sources.base import ImageSource
from ..data.sources.open import open_source
from ..distill.plan import Plan
from ..errors import ConfigError, DataError, UserError
from ..recipes.config import Recipe
from ..recipes.convert import flatten
from ..recipes.stages import (
    PREFIX,
    STAGES,
    Stages,
    dump,
    foreseen,
    in_stage,
    load,
    sources,
    teaching,
    with_models,
)
from ..recipes.yaml import load_recipe
from ..storage.atomic import disk_errors, sha256_file, write_atomic
from ..storage.lock import LOCK, wait_lock
from ..weights.create import check_is_file
from .networks import (
    Built,
    build_blank,
    check_has_weights,
    plan_of,
    resolve_run,
    runs_at,
    without_memory,
)
from .prepare import Images, open_images
from .stored import open_labels, stored_network, with_views_of_labels

STARTS = "starts.json"
IMAGES = "images/train"
"""The fingerprint of the images in ``starts.json``, beside the digests of weights by folder: no
folder can be called so.
"""

# --- what a stage builds on ----------------------------------------------------------------------


def resolved(stages: Stages, key: str, output: Path) -> Recipe:
    """The recipe of a stage as it runs in ``output``: the folders of earlier stages in place of
    their names, and the views of its labels.

    A folder is spelled as the stage's own run already spells it, which may have been begun
    elsewhere, or before ``output`` was moved.
    """
    return _resolved(stages, key, output, _saved(output / stages.stages[key].name))


def _saved(folder: Path) -> Recipe | None:
    """The recipe of the run in a folder, if there is one."""
    path = folder / "recipe.yaml"
    return load_recipe(path) if path.is_file() else None


def _resolved(stages: Stages, key: str, output: Path, saved: Recipe | None) -> Recipe:
    models = {path: spelled for path, (spelled, _) in _folders(stages, key, output, saved).items()}
    return with_views_of_labels(with_models(stages.stages[key], models), saved)


def _folders(
    stages: Stages, key: str, output: Path, saved: Recipe | None
) -> dict[str, tuple[str, Path]]:
    """The earlier stages that a stage builds on, by field: how its run spells each one's folder,
    and where that is.

    The run's own spelling is of that stage when it ends in the folder's name and ``starts.json``
    has it, whose digest `_other_weights` compares; without that note, when it leads there.
    """
    recipe = stages.stages[key]
    then = {} if saved is None else flatten(saved)
    noted = _read_starts(output).get(recipe.name, {})
    found = {}
    for path, source in sources(recipe).items():
        folder, spelled = output / stages.stages[source].name, str(then.get(path, ""))
        if folder.name in noted:
            same = Path(spelled).name == folder.name
        else:
            same = folder.is_dir() and os.path.isdir(spelled) and os.path.samefile(folder, spelled)
        found[path] = (spelled if same else str(folder), folder)
    return found


def networks_ahead(
    stages: Stages, key: str, num_classes: int, before: dict[str, int]
) -> tuple[Recipe, Built, dict[str, Built]]:
    """The recipe of a stage and its networks before any stage has run.

    ``before`` is how many classes the students of the stages before this one answer in; this one's
    is added.
    """
    recipe = foreseen(stages, key)
    answers = {name: before[source] for name, source in teaching(stages.stages[key]).items()}
    with in_stage(key), without_memory():
        student, teachers = build_blank(recipe, num_classes, answers)
    before[key] = student.network.num_classes
    return recipe, student, teachers


# --- running -------------------------------------------------------------------------------------


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
    """Train the stages one after the other into folders of ``output``; what is finished is not
    repeated, what was stopped is resumed.

    ``prepared`` is called with the job before the first step of each stage that runs, ``done`` with
    the stage's name, folder and summary after it, both on the main process. ``until`` names the
    stage to stop after. Returns the summaries by stage.

    Raises:
        UserError: as `vitdistill.runs.train.train` does; before anything runs also for what is
            wrong with a later stage, and for a folder that holds a stage with other settings, or
            one that began from other weights or images.
    """
    from ..world import join_world
    from .train import train

    output, console = Path(output), console or Console()
    stages = replace(stages, name=output.absolute().name or stages.name)
    if until is not None and until not in stages.stages:
        close = get_close_matches(until, stages.stages, n=1)
        raise ConfigError(
            f"there is no stage {until!r}: "
            + (
                f"did you mean {close[0]!r}?"
                if close
                else f"choose from {', '.join(stages.stages)}"
            )
        )
    summaries = {}
    with join_world(device) as here:
        here.from_main(partial(_check, stages, output, until, here.size))
        for number, (key, stage) in enumerate(stages.stages.items(), 1):
            if here.is_main:
                console.print(
                    f"stage {key} ({number} of {len(stages.stages)}): {output / stage.name}",
                    highlight=False,
                    markup=False,
                    soft_wrap=True,
                )
            with in_stage(key):
                recipe, places = here.from_main(partial(_begin, stages, key, output))
                note = partial(_note, stages=stages, key=key, output=output, prepared=prepared)
                with runs_at(places):
                    summaries[key] = train(
                        recipe, output / stage.name, device=device, console=console, prepared=note
                    )
            if here.is_main and done is not None:
                done(key, output / stage.name, summaries[key])
            if key == until:
                break
        here.from_main(partial(_save_unless_cut_short, stages, output, until))
    return summaries


def _check(stages: Stages, output: Path, until: str | None, num_processes: int) -> None:
    """Refuse before anything runs what can be known of every stage; nothing is written."""
    from .folder import RECIPE, SUMMARY, check_folder

    with disk_errors(output):
        found = (
            sorted(name for name in os.listdir(output) if not name.startswith("."))
            if output.is_dir()
            else []
        )
    foreign = [
        name for name in found if name not in {recipe.name for recipe in stages.stages.values()}
    ]
    if RECIPE in found:
        raise ConfigError(
            f"the output {output} holds a run without stages: name another folder with --output"
        )
    if foreign and STAGES not in found:
        raise ConfigError(
            f"the output {output} is not empty ({foreign[0]} is in it) and holds no stages: name"
            " another with --output"
        )
    _refuse_changed(stages, output)
    pending, keys = [], [*stages.stages]
    for key in keys[: None if until is None else keys.index(until) + 1]:
        folder = output / stages.stages[key].name
        with in_stage(key):
            check_folder(folder, resolved(stages, key, output))
        if not (folder / SUMMARY).is_file():
            pending.append(key)
    if len(pending) > 1:  # one finds its own mistakes
        _foresee(stages, pending, num_processes)


def _refuse_changed(stages: Stages, output: Path) -> None:
    """Raise `ConfigError` when the folder of a stage holds a run of other settings, or one that
    began from other weights or images.
    """
    changed: dict[str, str] = {}
    images: dict[str, str] = {}
    opened: dict[str, tuple[ImageSource, str]] = {}
    for key, recipe in stages.stages.items():
        saved = _saved(output / recipe.name)
        if saved is None:
            continue
        with in_stage(key):
            reason = _what_changed(stages, key, output, saved)
        if reason is None and _other_images(stages, key, output, saved, opened):
            reason = f"it was trained on other images than are in {recipe.data.dir} now"
            images[key] = saved.data.dir
        before = [source for source in sources(recipe).values() if source in changed]
        if reason is None and before:
            reason = f"it builds on {before[0]!r}"
        if reason is not None:
            changed[key] = reason
    if changed:
        (key, reason), *_ = changed.items()
        new = [
            f"{name}.name={_free_name(stages, stages.stages[name].name, output)}"
            for name in changed
        ]
        verb = "a new folder" if len(new) == 1 else "new folders"
        given = {name: recipe.data.dir for name, recipe in stages.stages.items()}
        own = [f"{name}.data.dir={folder}" for name, folder in {**given, **images}.items()]
        hint = (
            f"name the images of each stage in place of --data-dir, --set {' '.join(own)}, or "
            if {**given, **images} != given
            else ""
        )
        raise ConfigError(
            f"{output / stages.stages[key].name} holds the stage {key!r} as it was before"
            f" ({reason}): {hint}keep both by giving {verb}, --set {' '.join(new)}"
            + (", or another --output" if images else "")
        )


def _what_changed(stages: Stages, key: str, output: Path, saved: Recipe) -> str | None:
    """How the run in a stage's folder is not this stage, in a few words; None: it is."""
    from .folder import changes

    lines = changes(output / stages.stages[key].name, _resolved(stages, key, output, saved), saved)
    if lines:
        more = f", and {len(lines) - 3} more" if len(lines) > 3 else ""
        return "; ".join(lines[:3]) + more
    return _other_weights(stages, key, output)


def _other_weights(stages: Stages, key: str, output: Path) -> str | None:
    """Which stage's weights are not those the run in a stage's folder began from, in a few words;
    None: all are.
    """
    recipe = stages.stages[key]
    then = _read_starts(output).get(recipe.name, {})
    for source in sources(recipe).values():
        place = output / stages.stages[source].name
        now = _weights_of(place)
        if now is not None and then.get(place.name, now) != now:
            return f"it began from other weights of {source!r} than are in {place} now"
    return None


def _other_images(
    stages: Stages,
    key: str,
    output: Path,
    saved: Recipe,
    opened: dict[str, tuple[ImageSource, str]],
) -> bool:
    """Whether the images of a stage are not those the run in its folder began with; ``opened``:
    those already read, and their fingerprints.

    A folder that was moved has the same fingerprint, and one in which the image that stopped a run
    was replaced has the same images. Where no fingerprint was noted, the images that were named
    then are gone, or nothing was learnt from them, nothing is said.
    """
    recipe = stages.stages[key]
    then, place = _read_starts(output).get(recipe.name, {}).get(IMAGES), recipe.data.dir
    if then is None or not place or not _has_learnt(output / recipe.name):
        return False
    if place not in opened:
        try:
            with in_stage(key):
                source = open_source(place, "train")
                opened[place] = source, source.fingerprint()
        except UserError:
            if place != saved.data.dir:
                raise
            return False
    _, now = opened[place]
    return now != then and not recipe.train.accept_changed_images


def _has_learnt(folder: Path) -> bool:
    """Whether the run in a folder is finished, or has a state to go on from."""
    from .folder import SUMMARY

    return (folder / SUMMARY).is_file() or any((folder / "checkpoints").glob("step-*"))


def _free_name(stages: Stages, name: str, output: Path) -> str:
    """A folder name like ``name`` that is not taken: finetune_b, finetune_c, ..."""
    taken = {recipe.name for recipe in stages.stages.values()}
    base = re.sub(r"_[a-z]$", "", name)
    names = (f"{base}_{letter}" for letter in string.ascii_lowercase[1:])
    return next(
        (new for new in names if new not in taken and not (output / new).exists()), f"{base}_new"
    )


def _foresee(stages: Stages, pending: list[str], num_processes: int) -> None:
    """Resolve the plans of the stages that are to run, and look at what the later ones name: what
    is wrong shows before the first runs.
    """
    before: dict[str, int] = {}
    opened: dict[tuple[str, bool], Images] = {}
    for key, stage in stages.stages.items():
        with in_stage(key):
            stored = [
                stored_network(store, name).num_classes
                for name, store in open_labels(stage).items()
            ]
        recipe, student, teachers = networks_ahead(stages, key, max(stored, default=1000), before)
        with in_stage(key):
            if key in pending:
                plan = plan_of(
                    recipe,
                    student.network,
                    {name: built.network for name, built in teachers.items()},
                )
            if key in pending[1:]:
                _look_at_images(stage, opened, num_processes)
                _look_at_weights(stage)
                _look_at_optimizer(stage, student, plan)


def _look_at_images(
    stage: Recipe, opened: dict[tuple[str, bool], Images], num_processes: int
) -> None:
    """Raise what a stage's images and batches would end in once it begins.

    ``opened``: images that are open already, by their folder and whether labels are read.
    """
    place = stage.data.dir, any(objective.reads_labels for objective in stage.objectives.values())
    if place not in opened:
        opened[place] = open_images(stage)
    train = opened[place].train
    check_batches(
        train, stage.data.augment, stage.train.batch_size, num_processes, stage.train.accumulate
    )


def _look_at_weights(stage: Recipe) -> None:
    """Raise what the weights a stage names, or does not name, would end in once it begins."""
    if stage.student.checkpoint:
        check_is_file(stage.student.checkpoint)
    for name, config in stage.teachers.items():
        if config.labels is None and not config.model.startswith(PREFIX):
            check_has_weights(config, name)


def _look_at_optimizer(stage: Recipe, student: Built, plan: Plan) -> None:
    """Raise what a wrong name or argument of the optimizer would end in once a stage begins;
    ``student`` is on the meta device.
    """
    from ..distill.step import Distillation
    from .optim import make_optimizer

    args = {
        name: value for name, value in stage.optim.opt_args.items() if name != "fused"
    }  # which is for real devices
    with without_memory():
        make_optimizer(Distillation(student.model, plan), replace(stage.optim, opt_args=args))


def _begin(stages: Stages, key: str, output: Path) -> tuple[Recipe, dict[str, str]]:
    """The recipe to run, once the stages before it are finished, and where the folders are that it
    names.

    Raises:
        ConfigError: the run that is there began from other weights than they gave.
    """
    saved = _saved(output / stages.stages[key].name)
    if saved is not None and _other_weights(stages, key, output) is not None:
        _refuse_changed(stages, output)
    places = {
        spelled: str(folder) for spelled, folder in _folders(stages, key, output, saved).values()
    }
    return _resolved(stages, key, output, saved), places


def _note(
    job: Any, *, stages: Stages, key: str, output: Path, prepared: Callable[[Any], None] | None
) -> None:
    """Write down the staged recipe, and the weights and images a new run begins from, before its
    first file is written.

    A run that goes on with other images does so because nothing was learnt from those it began
    with, or because one was replaced: then they are those of all stages that began with the same.
    """
    _save(stages, output)
    recipe, images = stages.stages[key], job.identity["training images"]
    folder = output / recipe.name
    with wait_lock(output / LOCK):
        then = _read_starts(output)
        if (folder / "recipe.yaml").is_file():
            before, all_of_them = then.get(recipe.name, {}).get(IMAGES), _has_learnt(folder)
            same = {
                name
                for name, began in then.items()
                if before is not None and began.get(IMAGES) == before
            }
            now = {
                name: {**then[name], IMAGES: images}
                for name in (same if all_of_them else same & {recipe.name})
            }
        else:
            places = sorted({stages.stages[source].name for source in sources(recipe).values()})
            now = {
                recipe.name: {
                    **{place: _weights_of(output / place) for place in places},
                    IMAGES: images,
                }
            }
        if {**then, **now} != then:
            write_atomic(
                output / STARTS, json.dumps({**then, **now}, indent=2, sort_keys=True).encode()
            )
    if prepared is not None:
        prepared(job)


def _save_unless_cut_short(stages: Stages, output: Path, until: str | None) -> None:
    """Write down the staged recipe once its last stage is finished: until then the one there may be
    of a folder that has all.
    """
    if until is None or stages.stages[until] is stages.last or not (output / STAGES).is_file():
        _save(stages, output)


def _save(stages: Stages, output: Path) -> None:
    text = dump(stages).encode()
    path = output / STAGES
    if not path.is_file() or path.read_bytes() != text:
        write_atomic(path, text)


def _read_starts(output: Path) -> dict[str, dict[str, str]]:
    """What the run in each folder began from: the digest of the weights by the folder they were in,
    and of the `IMAGES`.
    """
    path = output / STARTS
    if not path.is_file():
        return {}
    try:
        return {str(name): dict(began) for name, began in json.loads(path.read_bytes()).items()}
    except (ValueError, TypeError, AttributeError):
        raise DataError(
            f"{path} is damaged: delete it to go on without the check that stages began from the"
            " weights and images that are there"
        ) from None


def last_run(output: Path) -> Path:
    """The folder of the run that is the result of the stages in ``output``; raises `ConfigError`
    when it has not begun.
    """
    from .folder import SUMMARY

    stages = load(output / STAGES)
    if not isinstance(stages, Stages):
        raise ConfigError(f"{output / STAGES} has no stages: name the folder of a run")
    folder = output / stages.last.name
    if not (folder / "recipe.yaml").is_file():
        finished = [str(path.parent) for path in sorted(output.glob(f"*/{SUMMARY}"))]
        first = output / next(iter(stages.stages.values())).name
        what = (
            f"name a finished run, {' or '.join(finished)}"
            if finished
            else f"name an earlier stage's folder, as {first}"
        )
        raise ConfigError(
            f"the last stage in {output} has not begun, so {folder} is not there: {what}"
        )
    return folder


def _weights_of(folder: Path) -> str | None:
    """The digest of what a finished run gives to others; None while it is not finished."""
    from .folder import SUMMARY

    if not (folder / SUMMARY).is_file():
        return None
    return sha256_file(Path(resolve_run(str(folder))) / "model.safetensors")
