"""What a label store holds, written beside its parts."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..storage.manifest import read_manifest
from .identity import differing
from .layout import Layout

FORMAT = 1
_KIND = "label store"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store holds: ``num_views`` views of ``num_samples`` samples, in parts of some size.

    Attributes:
        identity: what the answers depend on, as plain JSON; compared field by field.
        about: versions and the like, for people; never compared.
    """

    identity: dict[str, Any]
    layout: Layout
    num_samples: int
    num_views: int
    part_size: int = 16384
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = (self.num_samples, self.num_views, self.part_size)
        dicts = isinstance(self.identity, dict) and isinstance(self.about, dict)
        if not dicts or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"no store is of {self}")
        # As they will be read again: tuples become lists, and what is not JSON fails here.
        for name in ("identity", "about"):
            plain = json.loads(json.dumps(getattr(self, name), allow_nan=False))
            object.__setattr__(self, name, plain)

    @property
    def digest(self) -> str:
        """The sha256 (hex) of what may not change: all but ``num_views`` and ``about``."""
        fixed = {k: v for k, v in self.to_json().items() if k not in ("kind", "num_views", "about")}
        text = json.dumps(fixed, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def num_parts(self) -> int:
        return -(-self.num_samples // self.part_size)

    def part_range(self, part: int) -> tuple[int, int]:
        """Return the samples of a part: the first, and the one after the last."""
        lo = part * self.part_size
        return lo, min(lo + self.part_size, self.num_samples)

    def differences(self, wanted: "Manifest", there: str, here: str) -> str:
        """Name the compared fields in which ``wanted`` differs from this; "" if none does."""
        return differing(self._compared(), wanted._compared(), there, here)

    def _compared(self) -> dict[str, Any]:
        sizes = {"num_samples": self.num_samples, "part_size": self.part_size}
        return {**self.identity, **self.layout.to_json(), **sizes}

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON, which `read_store_manifest` reads from a folder's manifest."""
        return {
            "kind": _KIND,
            "format": FORMAT,
            "identity": self.identity,
            "layout": self.layout.to_json(),
            "num_samples": self.num_samples,
            "num_views": self.num_views,
            "part_size": self.part_size,
            "about": self.about,
        }


def read_store_manifest(folder: Path) -> Manifest:
    """Read the manifest of a store; `DataError` if it is missing, damaged or of something else."""
    body: Mapping[str, Any] = read_manifest(folder)["identity"]
    try:
        if (body["kind"], body["format"]) == (_KIND, FORMAT):
            known = {key: body[key] for key in body if key not in ("kind", "format", "layout")}
            manifest = Manifest(layout=Layout.from_json(body["layout"]), **known)
            assert manifest.layout.dtype.itemsize  # numpy refuses impossible shapes
            return manifest
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError):
        pass
    what = f"{folder} holds no labels, or labels of a format that is not read"
    raise DataError(what, "use the version of vitdistill that wrote them")
