"""Where weights came from, and under which licence: what every export carries on.

A record is plain JSON: ``model``, and where they are known ``weights``, ``license``, ``url`` and
``weights_sha256``; of a file under one of timm's names ``registry_license``, that of timm's own
weights. A network that this product trained has ``began_from`` and ``teachers``
besides, which are records in turn. What is not known is left out, and nothing is guessed: an
architecture's entry in timm's registry says nothing of other weights.
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
    architecture = name if saved is None else saved.architecture
    if checkpoint is not None:
        usual = get_pretrained_cfg(name) if saved is None and is_model(architecture) else None
        found = {"model": architecture.partition(".")[0], "weights": Path(checkpoint).name}
        return found | ({"registry_license": usual.license} if usual and usual.license else {})
    if saved is None:
        cfg = get_pretrained_cfg(name) if pretrained else None
        if cfg is None:
            return {"model": name} if pretrained else None
        known = {
            "model": ".".join(filter(None, (cfg.architecture, cfg.tag))),
            "weights": cfg.hf_hub_id or cfg.url,
            "license": cfg.license,
            "url": cfg.origin_url,
        }
    else:
        known = {
            "model": ".".join(
                filter(None, (architecture, None if saved.record else saved.cfg.get("tag")))
            ),
            "weights": name if name.startswith("hf") else None,
            "license": saved.cfg.get("license"),
            "url": saved.cfg.get("origin_url"),
            "weights_sha256": saved.digest,
            **{key: saved.record.get(key) for key in LINEAGE},
        }
    return {key: value for key, value in known.items() if value}


def ancestors(origin: Mapping[str, Any], role: str = "") -> Iterator[tuple[str, Origin]]:
    """Yield every network that a record names, with its part: ``teacher``, ``its beginning``."""
    of = f" of {role}" if role else ""
    began = origin.get("began_from")
    named = {} if began is None else {f"the beginning{of}": began}
    named |= {f"{name}{of}": record for name, record in origin.get("teachers", {}).items()}
    for part, record in named.items():
        yield part, record
        yield from ancestors(record, part)
