"""The part of a recipe that can change the result; by it a resume recognises its run."""

import hashlib
import json
import re

from .config import Recipe
from .convert import flatten, from_dict, to_dict
from .settings import DataConfig

VOLATILE = (
    "data.workers",
    "data.val_split",
    "data.skip_damaged",
    "train.log_every",
    "train.log_to",
    "train.keep_checkpoints",
    "train.accept_changed_images",
    "name",
    "description",
    "data.dir",
    "data.unlabelled",
)
"""Fields that do not change the result, so that a run may be resumed with others. Images and stored
labels (``teachers.NAME.labels``) are known by their content, not by their path.
"""

LATER = {
    "class_order": "same",
    "labelled_share": DataConfig.labelled_share,
    "saliency": "attention",
    "standardize": False,
}
"""Fields added later; left out while they have the value that was implied before."""


def is_volatile(path: str) -> bool:
    """Whether the field at ``path`` has no influence on the result."""
    return path in VOLATILE or bool(re.fullmatch(r"teachers\.\w+\.(labels|accept_unproven)", path))


def fingerprint(recipe: Recipe) -> str:
    """Return the sha256 of what can change the result; weights files are known by content."""
    # A recipe made in Python may hold 5 where the one read from its YAML holds 5.0.
    flat = flatten(from_dict(to_dict(recipe)))
    out = {f"{path}.checkpoint" for path, config in recipe.networks.items() if config.checkpoint}
    out |= {key for key, value in flat.items() if (key.rpartition(".")[2], value) in LATER.items()}
    fixed = {key: value for key, value in flat.items() if not is_volatile(key) and key not in out}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def differences(ours: Recipe, theirs: Recipe) -> list[str]:
    """Return a line for each field that differs and can change the result."""
    a, b = flatten(ours), flatten(theirs)
    return [
        f"{key} is {a.get(key)!r} here and {b.get(key)!r} there"
        for key in sorted(a.keys() | b.keys())
        if not is_volatile(key) and a.get(key) != b.get(key)
    ]
