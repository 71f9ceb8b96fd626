"""Networks saved in a folder or on the Hugging Face hub: what their config.json says."""

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.models import is_model
from timm.models._pretrained import PretrainedCfg
from torch import Tensor

from ..errors import ConfigError, DataError
from ..messages import first_line, printable
from ..storage.atomic import read_bytes, sha256_file
from ..storage.hub import settle_network
from . import hugging_face
from .files import load_state_dict
from .outside import is_outside

CONFIG = "config.json"
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
_SHARDS = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
MOST_CONFIG = 64 * 2**20  # bytes
_MOST = {"depth": 1000, "num_classes": 10**7}  # that a config.json may ask for

# timm's fields for where weights come from: here they come from the folder.
_SOURCES = ("url", "file", "state_dict", "hf_hub_id", "source")


@dataclass(frozen=True)
class Saved:
    """What a config.json says of a network: timm's architecture, arguments and ``pretrained_cfg``.

    ``fetch`` gets another file of the same place, or None; ``digest`` is the sha256 of weights that
    we exported, and ``record`` what we said of them; ``notes`` are logged when its weights are
    loaded.
    """

    place: str
    architecture: str
    args: dict[str, Any]
    cfg: dict[str, Any]
    fetch: Callable[[str], Path | None]
    digest: str | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """The number of classes its weights answer in; 0: none."""
        return int(self.cfg.get("num_classes", 1000))

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the images it was trained on, pixels; None: it does not say."""
        size: Any = self.args.get("img_size") or tuple(self.cfg.get("input_size") or ())[1:]
        if isinstance(size, int):
            return size, size
        return (int(size[0]), int(size[1])) if len(size) == 2 else None

    def load_weights(self, own: Collection[str]) -> tuple[dict[str, Tensor], str]:
        """Return its tensors, for a network whose names are ``own``, and where they are.

        `DataError` if they are not what was exported.
        """
        for name in (self.cfg.get("hf_hub_filename"), *WEIGHTS_FILES):
            file = self.fetch(name) if name else None
            if file is None:
                continue
            if self.digest is not None and sha256_file(file) != self.digest:
                what = "is damaged or was replaced: its sha256 is not the one in"
                raise DataError(f"{file} {what} {CONFIG} beside it", "export again")
            return load_state_dict(file, own), f"{self.place}/{name}"
        for name in _SHARDS:
            index = self.fetch(name)
            if index is not None:
                return self._load_shards(index, own), f"{self.place}/{name}"
        raise DataError(f"{self.place} has none of {', '.join(WEIGHTS_FILES)}")

    def _load_shards(self, index: Path, own: Collection[str]) -> dict[str, Tensor]:
        try:
            files = set(json.loads(read_bytes(index, MOST_CONFIG))["weight_map"].values())
            shards = {name: self.fetch(name) for name in sorted(files) if Path(name).name == name}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{index} is no list of weights files") from error
        state: dict[str, Tensor] = {}
        for name, shard in shards.items():
            if shard is None:
                raise DataError(f"{self.place} lacks {name}, which {index.name} names")
            state |= load_state_dict(shard, own)
        return state


def read_folder(folder: Path) -> Saved:
    """Read the network saved in a folder, in timm's form or Hugging Face's of a ViT."""
    place = folder.expanduser()
    if not place.is_dir():
        hub = f"write hf-hub:{folder} for a network of the Hugging Face hub"
        raise ConfigError(f"there is no folder {folder}", ("train it first", hub))
    if not (place / CONFIG).is_file() and (place / "best" / CONFIG).is_file():
        what = f"{place} is a run, not one of its networks"
        raise ConfigError(what, f"name {place / 'best'}")
    return _read(printable(place), lambda name: place / name if (place / name).is_file() else None)


def read_hub(place: str) -> Saved:
    """Read a network of Hugging Face's hub or its cache, ``ORG/NAME`` or ``ORG/NAME@REVISION``."""
    return _read(f"hf-hub:{printable(place)}", lambda name: _download(place, name))


def _download(place: str, filename: str) -> Path | None:
    repo, _, revision = place.partition("@")
    settle_network()
    try:
        return Path(huggingface_hub.hf_hub_download(repo, filename, revision=revision or None))
    except (OSError, ValueError, RuntimeError, EntryNotFoundError) as error:
        # Offline, "not in the cache" is an EntryNotFoundError too, and proves nothing.
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        what = f"hf-hub:{place} cannot be reached ({first_line(error)})"
        fix = "without network, download it elsewhere and give its folder"
        raise DataError(what, fix) from error


def _read(place: str, fetch: Callable[[str], Path | None]) -> Saved:
    path = fetch(CONFIG)
    if path is None:
        what = f"{place} has no {CONFIG}, so no network can be built from it"
        found = sorted(file for n in ("*", "*/*") for file in Path(place).glob(f"{n}/{CONFIG}"))
        fix = "name timm's network, and give the weights as its checkpoint"
        if found:
            fix = f"give a folder inside it, such as {found[0].parent}"
        raise ConfigError(what, fix)
    try:
        config = json.loads(read_bytes(path, MOST_CONFIG))
        if "model_type" in config and "architecture" not in config:
            beside = fetch(hugging_face.PREPROCESSOR) or fetch(hugging_face.PROCESSOR)
            architecture, args, cfg, notes = hugging_face.read_config(path, config, beside)
            _check({**dict(args.get("config") or {}).get("vision_config", {}), **args, **cfg})
            return Saved(place, architecture, args, cfg, fetch, notes=notes)
        architecture, args = str(config["architecture"]), dict(config.get("model_args") or {})
        cfg = _pretrained_cfg(config)
        record = dict(config.get("vitdistill") or {})
        _check({**args, **cfg})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is no configuration of timm's") from error
    if not (is_model(architecture) or is_outside(architecture)):
        what = f"{path} names the architecture {architecture!r}, which timm"
        fix = "install the timm that wrote it"
        raise ConfigError(f"{what} {timm.__version__} does not have", fix)
    return Saved(place, architecture, args, cfg, fetch, record.get("weights_sha256"), record)


def _check(said: Mapping[str, Any]) -> None:
    """Raise `ValueError` or `TypeError` for what no network has: text as a mean, a depth of 1e9."""
    triples = [said[key] for key in ("mean", "std", "input_size") if said.get(key) is not None]
    numbers = [*chain(*triples), said.get("crop_pct") or 1, said.get("num_classes") or 0]
    if not all(map(math.isfinite, numbers)) or any(len(triple) != 3 for triple in triples):
        raise ValueError(f"mean, std and input_size {triples}")
    "".join(said.get("label_names") or ())
    for key, value in said.items():
        several = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(x, int) and x > _MOST.get(key, 10**5) for x in several):
            raise ValueError(f"{key} {value}")


def _pretrained_cfg(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that timm's ``PretrainedCfg`` knows; old files have them at the top."""
    cfg = dict(config.get("pretrained_cfg", config))
    for key in ("num_classes", "label_names", "label_descriptions"):
        if key in config:
            cfg[key] = config[key]
    if "labels" in cfg:
        cfg["label_names"] = cfg.pop("labels")
    known = PretrainedCfg.__dataclass_fields__.keys() - _SOURCES
    return {key: value for key, value in cfg.items() if key in known}
