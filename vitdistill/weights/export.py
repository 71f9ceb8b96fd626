"""A trained network as something others load: a folder for timm, or an ONNX file, checked against
the network.
"""

import copy
import hashlib
import importlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from timm.models import is_model
from torch import Tensor, nn

from ..errors import ConfigError, DataError
from ..messages import printable
from ..storage.atomic import (
    clear_aside,
    disk_errors,
    read_bytes,
    staged_dir,
    write_atomic,
    write_new,
)
from ..storage.tensors import tensor_bytes
from .create import create_model

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
FILES = frozenset({CONFIG, WEIGHTS})

# Arguments of training that say nothing about the weights.
_TRAINING_ARGS = (
    "drop_path_rate",
    "drop_rate",
    "attn_drop_rate",
    "proj_drop_rate",
    "pos_drop_rate",
    "patch_drop_rate",
)
ONNX_TOLERANCE = 1e-4


@runtime_checkable
class InputLike(Protocol):
    """What a network wants to be fed; ``vitdistill.data.augment.InputSpec`` is one."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        ...

    @property
    def mean(self) -> Sequence[float]:
        """Per channel, of pixels in [0, 1]."""
        ...

    @property
    def std(self) -> Sequence[float]:
        """Per channel, of pixels in [0, 1]."""
        ...

    @property
    def interpolation(self) -> str:
        """Pillow's name of the filter, in lower case."""
        ...

    @property
    def crop_pct(self) -> float:
        """The fraction of the resized image's side that the centre crop keeps."""
        ...

    @property
    def crop_mode(self) -> str:
        """timm's name of how an image that is not square is cropped: ``center``, ``squash`` or
        ``border``.
        """
        ...


def export_timm(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    architecture: str,
    model_args: Mapping[str, Any] | None,
    classes: Sequence[str] | None,
    input_spec: InputLike,
) -> Path:
    """Write ``config.json`` and ``model.safetensors`` so that timm builds the same network, and
    return the folder.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` then gives the same answers bit for
    bit; before anything is written the folder's content is loaded and compared. ``architecture`` is
    timm's name (a tag is dropped), ``model_args`` what the network was built with besides;
    ``classes`` the names in the order of the logits, if known. Raises ``ConfigError`` when the
    folder holds anything this function did not write, or when the arguments do not rebuild the
    network; ``DataError`` when its weights do not load or answer differently; ``DiskError`` when
    there is no room.
    """
    final = Path(folder)
    name, _, tag = architecture.partition(".")
    if not is_model(name):
        raise ConfigError(
            f"timm has no network called {printable(architecture)}, so this one cannot be"
            " exported for it."
        )
    network = _unwrapped(model)
    num_classes = int(getattr(network, "num_classes", 0))
    if classes is not None and len(classes) != num_classes:
        raise ConfigError(
            f"{len(classes)} class names were given for a network of {num_classes} classes; give"
            " all, in order."
        )
    _refuse_foreign(final)
    state = {_bare_key(key): value.detach().cpu() for key, value in network.state_dict().items()}
    content = tensor_bytes(state, {"format": "pt"})
    config = _config(network, name, tag, dict(model_args or {}), classes, input_spec)
    old = final.with_name(f".replaced-{final.name[:100]}-{secrets.token_hex(4)}")
    with staged_dir(final, aside=old) as temp:
        config["vitdistill"] = {
            "version": _version(),
            "weights_sha256": hashlib.sha256(content).hexdigest(),
        }
        write_new(temp / WEIGHTS, content)
        write_new(temp / CONFIG, _json(config))
        _check_reload(network, state, temp, input_spec, name)
    if old.exists():
        clear_aside(old, final, FILES)
    return final


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network inside torch.compile and DistributedDataParallel."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(
            model, nn.parallel.DistributedDataParallel | nn.DataParallel
        ):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _bare_key(key: str) -> str:
    return key.replace("._orig_mod.", ".")


def _refuse_foreign(folder: Path) -> None:
    """A folder that is absent, empty, or an earlier export may be written, whatever hidden files
    are in it; any other is the user's.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{printable(folder)} is a file; give the export a folder of its own.")
    with disk_errors(folder):
        names = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
    if not names:
        return
    foreign = sorted(names - FILES)
    if foreign:
        raise ConfigError(
            f"{printable(folder)} holds {printable(foreign[0])}, which no export wrote;"
            " give another folder."
        )
    try:
        ours = "weights_sha256" in json.loads(read_bytes(folder / CONFIG))["vitdistill"]
    except (DataError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise ConfigError(
            f"{printable(folder)} holds a network that vitdistill did not export; give another"
            " folder."
        )


def _config(
    network: nn.Module,
    architecture: str,
    tag: str,
    args: dict[str, Any],
    classes: Sequence[str] | None,
    spec: InputLike,
) -> dict[str, Any]:
    cfg = copy.deepcopy(getattr(network, "pretrained_cfg", None) or {})
    num_classes = int(network.num_classes)  # type: ignore[arg-type]
    in_chans = int(cfg.get("input_size", (3,))[0])
    args = {
        key: value for key, value in args.items() if value is not None and key not in _TRAINING_ARGS
    }
    height, width = (int(side) for side in spec.image_size)
    dynamic = bool(args.get("dynamic_img_size")) or args.get("strict_img_size") is False
    # Convolutional networks take any size and have no such argument, whatever size they were
    # trained at.
    args.pop("img_size", None)
    embed_size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    if embed_size is not None and (cfg.get("fixed_input_size") or dynamic):
        args["img_size"] = [int(side) for side in embed_size]
    args["num_classes"] = num_classes
    if in_chans != 3:
        args["in_chans"] = in_chans
    pretrained_cfg = {
        "tag": tag or "vitdistill",
        "custom_load": False,
        "input_size": [in_chans, height, width],
        "fixed_input_size": bool(cfg.get("fixed_input_size", False)) and not dynamic,
        "interpolation": spec.interpolation,
        "crop_pct": float(spec.crop_pct),
        "crop_mode": spec.crop_mode,
        "mean": [float(value) for value in spec.mean],
        "std": [float(value) for value in spec.std],
        "num_classes": num_classes,
        "pool_size": cfg.get("pool_size"),
        "first_conv": cfg.get("first_conv"),
        "classifier": cfg.get("classifier"),
    }
    if cfg.get("license"):
        pretrained_cfg["license"] = cfg["license"]
    if classes is not None:
        pretrained_cfg["label_names"] = [str(name) for name in classes]
    return {
        "architecture": architecture,
        "num_classes": num_classes,
        "num_features": int(network.num_features),  # type: ignore[arg-type]
        "model_args": args,
        "pretrained_cfg": pretrained_cfg,
    }


def _json(config: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(config, indent=2, ensure_ascii=True).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"A model argument cannot be written into {CONFIG} ({error}); export needs plain"
            " numbers, strings and lists."
        ) from error


def _version() -> str:
    try:
        return version("vitdistill")
    except PackageNotFoundError:
        return "unknown"


def _check_reload(
    network: nn.Module, ours: Mapping[str, Tensor], folder: Path, spec: InputLike, architecture: str
) -> None:
    """Build the network from the folder alone and compare weights and answers, bit for bit."""
    again = create_model(str(folder))
    theirs = again.state_dict()
    changed = [
        key
        for key in theirs
        if theirs[key].dtype != ours[key].dtype or not torch.equal(theirs[key], ours[key])
    ]
    if changed:
        raise DataError(
            f"The export of {architecture} reads back changed at {changed[0]}; the disk is failing,"
            " or its type is not the network's: export a float32 network."
        )
    images = _probe(network, spec)
    reference = copy.deepcopy(network).to("cpu")
    kernels = {
        name: module.fused_attn
        for name, module in again.named_modules()
        if hasattr(module, "fused_attn")
    }
    for name, module in reference.named_modules():
        if (
            _bare_key(f"{name}.").rstrip(".") in kernels
        ):  # a choice of kernel for this machine, not of the network
            module.fused_attn = kernels[_bare_key(f"{name}.").rstrip(".")]
    expected, found = _answers(reference, images), _answers(again, images)
    if not torch.equal(expected, found):
        off = (
            (expected - found).abs().max().item() if expected.shape == found.shape else float("nan")
        )
        raise ConfigError(
            f"timm's {architecture} with the given model_args holds the same weights and answers"
            f" differently (by {off:.3g}); pass every argument that the network was built with."
        )


def _probe(network: nn.Module, spec: InputLike) -> Tensor:
    cfg = getattr(network, "pretrained_cfg", None) or {}
    channels = int(cfg.get("input_size", (3,))[0])
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, *spec.image_size, generator=generator)


@torch.no_grad()
def _answers(network: nn.Module, images: Tensor) -> Tensor:
    was_training = network.training
    try:
        answer: Tensor = network.eval()(images)
        return answer
    finally:
        network.train(was_training)


def export_onnx(model: nn.Module, path: str | os.PathLike[str], spec: InputLike) -> float:
    """Write a single-file ONNX network with a free batch size, and return how far onnxruntime's
    logits are from torch's.

    The input is ``images`` float32 (B, 3, H, W), already normalised; the output ``logits`` (B, C).
    The difference is the largest absolute one over batches of 1 and 3. Raises ``ConfigError`` when
    the extra is not installed or the network cannot be exported, ``DataError`` when the difference
    is above 1e-4; nothing is written then.
    """
    try:
        onnxruntime = [
            importlib.import_module(name) for name in ("onnx", "onnxscript", "onnxruntime")
        ][-1]
    except ImportError as error:
        raise ConfigError(
            f'ONNX export needs {error.name}; pip install "vitdistill[onnx]"'
        ) from error
    network = copy.deepcopy(_unwrapped(model)).to("cpu", torch.float32).eval()
    images = _probe(network, spec)
    data = _onnx_bytes(network, images)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    off = 0.0
    for batch in (images[:1], torch.cat([images, images[:1].flip(-1)])):
        found = torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])
        expected = _answers(network, batch)
        if found.shape != expected.shape:
            raise DataError(
                f"The ONNX network answers {tuple(found.shape)} instead of {tuple(expected.shape)};"
                " nothing was written."
            )
        here = (found - expected).abs().max().item()
        if not here <= ONNX_TOLERANCE:  # NaN is not
            raise DataError(
                f"The ONNX network's logits are {here:.3g} away from torch's, more than"
                f" {ONNX_TOLERANCE:g}; nothing was written: export for timm instead, and report the"
                " architecture."
            )
        off = max(off, here)
    write_atomic(path, data)
    return off


def _onnx_bytes(network: nn.Module, images: Tensor) -> bytes:
    """The exported model, serialised in memory: torch's own save would write the final name, and
    not atomically.
    """
    try:
        program = torch.onnx.export(
            network,
            (images,),
            dynamo=True,
            external_data=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ConfigError(
            f"{type(network).__name__} cannot be exported to ONNX ({first}); export for timm"
            " instead."
        ) from error
    if program is None:
        raise ConfigError(
            f"{type(network).__name__} cannot be exported to ONNX; export for timm instead."
        )
    try:
        return program.model_proto.SerializeToString()
    except ValueError as error:
        raise ConfigError(
            "The network is above the 2 GB that one ONNX file can hold; export for timm instead."
        ) from error
