"""What a run's result depends on besides its settings: weights, images and labels, by content.

``identity.json`` holds a digest of each, written before the first step, so that a resume can tell
whether anything changed; moving a file or folder changes nothing.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, Fix, Give, Set
from ..recipes import RECIPE
from ..recipes.config import Recipe
from ..recipes.convert import flatten, replace_fields
from ..recipes.fingerprint import differences, fingerprint
from ..recipes.settings import StudentConfig, TeacherConfig
from ..recipes.stages import STAGES, Stages, load
from ..recipes.yaml import load_recipe
from ..storage.atomic import sha256_file, write_atomic
from ..weights.create import is_timm_name
from ..weights.origin import Origin, origin_of

IDENTITY, SUMMARY = "identity.json", "summary.json"
WEIGHTS = "model.safetensors"
IMAGES = ("training images", "validation images")


def resolve_run(name: str, kinds: Sequence[str] = ("best", "last")) -> str:
    """Return the folder of weights that a model's name stands for.

    A run stands for the first of ``kinds`` that it has (it has no ``best/`` if it had nothing to
    choose by); a folder of stages for its last run; any other name for itself, and so does one of
    timm's: a run that is called the same is ``./NAME``.

    Raises:
        ConfigError: the run has no weights yet.
    """
    folder = Path(name)
    if is_timm_name(name):
        return name
    if runs := stages_in(folder):
        folder = runs[-1]
    elif not (folder / RECIPE).is_file():
        return name
    for kind in kinds:
        if (folder / kind / "config.json").is_file():
            return str(folder / kind)
    what = f"the run {folder} has no {' or '.join(kinds)} weights yet"
    raise ConfigError(what, "train it to its first evaluation")


def is_unfinished(name: str) -> bool:
    """Whether a model's name stands for weights of an unfinished run."""
    run = Path(resolve_run(name)).parent
    return (run / RECIPE).is_file() and not (run / SUMMARY).is_file()


def stages_in(folder: Path) -> list[Path]:
    """Return the run folders in a folder of stages, in order; [] for any other folder."""
    if not (folder / STAGES).is_file():
        return []
    stages = load(folder / STAGES)
    assert isinstance(stages, Stages)
    return [folder / stage.name for stage in stages.stages.values()]


def weights_identity(recipe: Recipe) -> dict[str, str]:
    """Return the digests of the weights on this disk that a recipe names, by field."""
    files = {}
    for path, config in recipe.networks.items():
        if config.checkpoint:
            files[f"{path}.checkpoint"] = Path(config.checkpoint)
        elif config.model:
            with suppress(ConfigError):  # a run without weights yet
                place = Path(resolve_run(config.model))
                files[f"{path}.model"] = place if place.is_file() else place / WEIGHTS
    return {field: sha256_file(file) for field, file in files.items() if file.is_file()}


def origin_of_config(config: StudentConfig | TeacherConfig) -> Origin | None:
    """Describe where the weights that a recipe names come from; None: they are random."""
    return origin_of(resolve_run(config.model), config.checkpoint, config.pretrained)


def changes(folder: Path, recipe: Recipe) -> list[str]:
    """Return how ``recipe`` differs from the run in this folder in what can change its result.

    Weights are compared by content: the path may differ where the content does not.
    """
    saved, then, now = load_recipe(folder / RECIPE), read_identity(folder), weights_identity(recipe)
    before, after = flatten(saved), flatten(recipe)
    same = {field: after[field] for field in now if then.get(field) == now[field]}
    lines = differences(recipe, replace_fields(saved, same))
    if has_learnt(folder):
        for field in now:
            if then.get(field, now[field]) != now[field] and before.get(field) == after[field]:
                lines.append(f"{field} has other weights than when the run began")
    return lines


def has_learnt(folder: Path) -> bool:
    """Whether the run in a folder is finished, or has a state to go on from."""
    return (folder / SUMMARY).is_file() or any((folder / "checkpoints").glob("step-*"))


def read_identity(folder: Path) -> dict[str, Any]:
    """Read what the run in this folder began with; {} if that was not noted."""
    return read_record(folder / IDENTITY) or {}


def read_record(path: Path, keys: Collection[str] = ()) -> dict[str, Any] | None:
    """Return the mapping in a JSON file of a run's folder; None if there is no file.

    Raises:
        DataError: it is damaged, or lacks one of ``keys``.
    """
    if not path.is_file():
        return None
    with suppress(ValueError):
        if isinstance(found := json.loads(path.read_bytes()), dict) and {*keys} <= found.keys():
            return found
    raise DataError(f"{path} is damaged", "delete it to go on without what it says")


def note_identity(folder: Path, recipe: Recipe, identity: Mapping[str, str]) -> None:
    """Record what a run begins with, or refuse to continue with anything else.

    ``identity`` is what is known once everything is built; `changes` compares weights.

    Raises:
        DataError: something that the run has learnt from, or will, has changed.
    """
    then = read_identity(folder)
    now = {"recipe": fingerprint(load_recipe(folder / RECIPE)), **identity}
    if has_learnt(folder):
        changed = [what for what in now if then.get(what, now[what]) != now[what]]
        if recipe.train.accept_changed_images:
            changed = [what for what in changed if what not in IMAGES]
        if changed:
            fixes: tuple[Fix, ...] = ("restore what was there", Give("output"))
            if {*changed} <= {*IMAGES}:
                fixes += (Set("train.accept_changed_images", True),)
            what = f"the {', '.join(changed)} of this run have changed since {folder} began"
            raise DataError(what, fixes, field=changed[0])
    now = then | now | weights_identity(recipe)
    if now != then or not (folder / IDENTITY).is_file():
        write_atomic(folder / IDENTITY, json.dumps(now, indent=2, sort_keys=True).encode())
