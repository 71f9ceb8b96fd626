"""What labels belong to: the images, the views and the teacher, as plain values that have names."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from typing import Any

from ..data.augment import Augment, InputSpec
from ..data.sources.base import ImageSource
from ..errors import DataError
from ..vit.network import Network

_OF_VIEWS = ("images.", "classes.", "view.")


def views_identity(
    source: ImageSource,
    classes: Sequence[str],
    spec: InputSpec,
    augment: Augment,
    seed: int,
    pipeline: str,
) -> dict[str, Any]:
    """Return everything that makes view v of sample i, mixing included, and the classes."""
    digest = hashlib.sha256("\0".join(classes).encode("utf-8", "surrogateescape")).hexdigest()
    shown = list(classes) if len(classes) <= 20 else [*classes[:3], f"... {len(classes)} classes"]
    identity: dict[str, Any] = {
        "images.count": len(source),
        "images.fingerprint": source.fingerprint(),
        "classes.names": shown,
        "classes.digest": digest if classes else "",
        "view.seed": seed,
        "view.random": "splitmix64/1",  # name and version of the arithmetic of `vitdistill.keyed`
        "view.pipeline": pipeline,
        "view.image_size": list(spec.image_size),
        "view.mean": list(spec.mean),
        "view.std": list(spec.std),
    }
    if augment.crop == "center":
        identity |= {
            "view.crop_pct": spec.crop_pct,
            "view.crop_mode": spec.crop_mode,
            "view.eval_interpolation": spec.interpolation,
        }
    for field in dataclasses.fields(augment):
        value = getattr(augment, field.name)
        identity[f"view.augment.{field.name}"] = list(value) if isinstance(value, tuple) else value
    return identity


def of_views(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of an identity that a student must share with its labels."""
    return {key: value for key, value in identity.items() if key.startswith(_OF_VIEWS)}


def augment_of(identity: Mapping[str, Any]) -> Augment:
    """Return the augmentation of the views that were labelled."""
    known = {f"view.augment.{field.name}": field.name for field in dataclasses.fields(Augment)}
    values: dict[str, Any] = {
        known[key]: tuple(value) if isinstance(value, list) else value
        for key, value in identity.items()
        if key in known
    }
    return Augment(**values)


def describe_views(identity: Mapping[str, Any]) -> str:
    """Say how the labelled views were made, in Python's notation."""
    settings = vars(augment_of(identity)).items()
    said = ", ".join(f"{key}={v!r}" for key, v in settings if v != getattr(Augment, key))
    height, width = identity.get("view.image_size", ("?", "?"))
    return f"Augment({said}), seed {identity.get('view.seed')}, {height} x {width} pixels"


def network_to_json(network: Network) -> dict[str, Any]:
    plain = dataclasses.asdict(network)
    plain["grids"] = {str(block): list(grid) for block, grid in network.grids.items()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


def network_from_json(plain: Mapping[str, Any], name: str) -> Network:
    """Read what `network_to_json` returned, under the name that this run gives the network."""
    try:
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()
        }
        values["grids"] = {int(block): tuple(grid) for block, grid in plain["grids"].items()}
        return Network(**{**values, "name": name})
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        what = f"the labels of the {name} describe no network ({error})"
        raise DataError(what, "use the version of vitdistill that wrote them") from error


def versions() -> dict[str, str]:
    """Return the versions of the libraries that make views and run teachers, for people."""
    names = ("vitdistill", "torch", "torchvision", "timm", "Pillow", "numpy")
    known = {name: list(distributions(name=name)) for name in names}
    return {name: found[0].version if found else "unknown" for name, found in known.items()}


def changed_versions(then: Mapping[str, str]) -> str:
    """Say which libraries have another version than ``then``: ``timm (1.0.22, now 1.0.24)``."""
    now = versions()
    changed = [name for name in now if then.get(name, now[name]) != now[name]]
    return ", ".join(f"{name} ({then[name]}, now {now[name]})" for name in changed)


def differing(
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    there: str = "in the labels",
    here: str = "here",
) -> str:
    """Name the keys whose values differ, with both values; "" if none does."""
    found = []
    for key in dict.fromkeys([*theirs, *ours]):
        a, b = (
            json.dumps(v[key], sort_keys=True) if key in v else "absent" for v in (theirs, ours)
        )
        if a != b:
            found.append(f"{key} is {_cut(a)} {there} and {_cut(b)} {here}")
    more = [f"and {len(found) - 5} more"] if len(found) > 5 else []
    return "; ".join([*found[:5], *more])


def _cut(text: str) -> str:
    if len(text) == 66:  # a SHA-256 in quotes: nobody compares it by eye
        return f'{text[:9]}..."'
    return text if len(text) <= 80 else f"{text[:77]}..."
