"""Where weights came from, and under which licence: what every export carries on.

A record is plain JSON: ``model``, and where they are known ``weights``, ``license``, ``url`` and
``weights_sha256``; for a file under one of timm's names, ``registry_license`` is that of timm's own
weights. A network that this product trained also has ``began_from`` and ``teachers``, which are
records in turn. What is not known is left out, and nothing is guessed: an architecture's entry in
timm's registry says nothing of other weights.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg, is_model

from .create import read_saved

Origin = dict[str, Any]
LINEAGE = ("began_from", "teachers")


def origin_of(
    name: str, checkpoint: str | os.PathLike[str] | None = None, pretrained: bool = False
) -> Origin | None:
    """Describe the weights of ``create_model(name, checkpoint=..., pretrained=...)``.

    None: they are random.
    """
    saved = read_saved(name)
    if saved is None and checkpoint is None and not pretrained:
        return None
    architecture = name if saved is None else saved.architecture
    usual = get_pretrained_cfg(name) if saved is None and is_model(architecture) else None
    known: Origin
    if checkpoint is not None:
        known = {"model": architecture.partition(".")[0], "weights": Path(checkpoint).name}
        known["registry_license"] = usual and usual.license
    elif saved is not None:
        tag = None if saved.record else saved.cfg.get("tag")
        known = {
            "model": ".".join(filter(None, (architecture, tag))),
            "weights": name if name.startswith("hf") else None,
            "license": saved.cfg.get("license"),
            "url": saved.cfg.get("origin_url"),
            "weights_sha256": saved.digest,
            **{key: saved.record.get(key) for key in LINEAGE},
        }
    elif usual is None:
        known = {"model": name}
    else:
        known = {
            "model": ".".join(filter(None, (usual.architecture, usual.tag))),
            "weights": usual.hf_hub_id or usual.url,
            "license": usual.license,
            "url": usual.origin_url,
        }
    return {key: value for key, value in known.items() if value}


def ancestors(origin: Mapping[str, Any], role: str = "") -> Iterator[tuple[str, Origin]]:
    """Yield every network that a record names, with its part: ``teacher``, ``initial weights``."""
    of = f" of {role}" if role else ""
    began = origin.get("began_from")
    named = {} if began is None else {f"initial weights{of}": began}
    named |= {f"{name}{of}": record for name, record in origin.get("teachers", {}).items()}
    for part, record in named.items():
        yield part, record
        yield from ancestors(record, part)
