"""A trained network as others load it: a folder for timm, an ONNX or a torch.export file, each
checked against it.

The first export of a run is proved: timm's network is built from the folder alone, and must answer
bit for bit the same. Later ones differ in their weights alone, whose digest is read back.
"""

import hashlib
import importlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from torch import Tensor, nn

from .. import __version__
from ..data.augment import InputSpec
from ..data.model_input import input_spec_of
from ..errors import ConfigError, DataError, DiskError, Give
from ..messages import first_line
from ..storage import atomic
from ..storage.atomic import disk_errors, sha256_file
from ..storage.tensors import tensor_bytes
from ..vit.copies import copy_network
from .create import create_model
from .files import bare_key, check_finite
from .folder import CONFIG, WEIGHTS_FILES

WEIGHTS = WEIGHTS_FILES[0]
FILES = frozenset({CONFIG, WEIGHTS})

TOLERANCE = 1e-4  # of the logits of a traced network
ABOUT = "about.json"
_FREE_BATCH = ({0: torch.export.Dim("batch")},)


def export_timm(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    architecture: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    input_spec: InputSpec | None = None,
    origin: Mapping[str, Any] | None = None,
    prove: bool = True,
) -> Path:
    """Write ``config.json`` and ``model.safetensors`` for timm, and return the folder.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` then gives the same answers bit for
    bit. An earlier export is replaced as a whole or not at all.

    Args:
        architecture: timm's name, with or without a tag; None: as the network knows it.
        model_args: what the network was built with besides, as plain JSON.
        classes: the names in the order of the logits, if known.
        input_spec: the images it was trained on; None: as its ``pretrained_cfg`` says.
        origin: where the weights come from, ``began_from`` and ``teachers`` (`origin_of`).
        prove: load what was written and compare answers before it gets its name. False where an
            export of the same network and arguments was proved: only the digest is read back.

    Raises:
        ConfigError: the folder holds something else, or the arguments do not rebuild the network.
        DataError: the weights do not load, or load with other values.
    """
    final = Path(folder)
    network = _unwrapped(model)
    input_spec = input_spec or input_spec_of(network)
    said = architecture or (getattr(network, "pretrained_cfg", None) or {}).get("architecture")
    if not said:
        what = f"{type(network).__name__} is no network of timm that says its architecture"
        fixes = Give("architecture"), "give the network alone, as the student of a Distiller"
        raise ConfigError(what, fixes, field="architecture")
    name = str(said).partition(".")[0]
    _refuse_foreign(final)
    state = {bare_key(key): value.detach().cpu() for key, value in network.state_dict().items()}
    check_finite(state, f"the network for {final}")
    content = tensor_bytes(state, {"format": "pt"})
    digest = hashlib.sha256(content).hexdigest()
    config = _config(network, name, dict(model_args or {}), classes, input_spec)
    config["vitdistill"] = {"version": __version__, "weights_sha256": digest, **(origin or {})}
    with atomic.staged_dir(final, replaces=FILES) as temporary:
        atomic.write_new(temporary / WEIGHTS, content)
        atomic.write_new(temporary / CONFIG, json.dumps(config, indent=2).encode() + b"\n")
        if sha256_file(temporary / WEIGHTS) != digest:
            what = "was written but reads back changed, so the disk is failing"
            raise DiskError(f"{final} {what}")
        if prove:
            _check_reload(network, state, temporary, input_spec, name)
    return final


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside torch.compile and DistributedDataParallel."""
    wrappers = nn.parallel.DistributedDataParallel | nn.DataParallel
    inner = model.module if isinstance(model, wrappers) else getattr(model, "_orig_mod", None)
    return _unwrapped(inner) if isinstance(inner, nn.Module) else model


def _refuse_foreign(folder: Path) -> None:
    """Refuse a folder with anything in it but an earlier export, and hidden files."""
    with disk_errors(folder):
        found = folder.iterdir() if folder.exists() else ()
        names = {entry.name for entry in found if not entry.name.startswith(".")}
    if not names:
        return
    ours = False
    with suppress(DataError, ValueError, KeyError, TypeError):
        ours = "weights_sha256" in json.loads(atomic.read_bytes(folder / CONFIG))["vitdistill"]
    if names - FILES or not ours:
        other = min(names - FILES or names)
        what = f"{folder} holds something that vitdistill did not export: {other}"
        raise ConfigError(what, fix=Give("output"), field="output")


def _config(
    network: nn.Module,
    architecture: str,
    args: dict[str, Any],
    classes: Sequence[str] | None,
    spec: InputSpec,
) -> dict[str, Any]:
    cfg = getattr(network, "pretrained_cfg", None) or {}
    num_classes = int(network.num_classes)  # type: ignore[arg-type]
    # Inference needs none of training's arguments (drop_path_rate, ...).
    args = {k: v for k, v in args.items() if v is not None and not re.search(r"drop.*_rate$", k)}
    dynamic = bool(args.get("dynamic_img_size")) or args.get("strict_img_size") is False
    embed_size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    if not (cfg.get("fixed_input_size") or dynamic):
        args.pop("img_size", None)  # convolutional networks take any size, and no such argument
    elif embed_size is not None:
        args["img_size"] = [int(side) for side in embed_size]
    args["num_classes"] = num_classes
    pretrained_cfg = {
        "tag": "vitdistill",
        "custom_load": False,
        "input_size": [3, *map(int, spec.image_size)],
        "fixed_input_size": bool(cfg.get("fixed_input_size", False)) and not dynamic,
        "interpolation": spec.interpolation,
        "crop_pct": float(spec.crop_pct),
        "crop_mode": spec.crop_mode,
        "mean": [float(value) for value in spec.mean],
        "std": [float(value) for value in spec.std],
        "num_classes": num_classes,
        **{key: cfg.get(key) for key in ("pool_size", "first_conv", "classifier")},
    }
    if classes is not None and len(classes) != num_classes:
        what = f"{len(classes)} classes are named, and the network answers in {num_classes}"
        raise ConfigError(what, Give("classes"), field="classes")
    if classes is not None:
        pretrained_cfg["label_names"] = [str(name) for name in classes]
    return {
        "architecture": architecture,
        "num_classes": num_classes,
        "num_features": int(network.num_features),  # type: ignore[arg-type]
        "model_args": args,
        "pretrained_cfg": pretrained_cfg,
    }


def _check_reload(
    network: nn.Module,
    state: Mapping[str, Tensor],
    folder: Path,
    spec: InputSpec,
    architecture: str,
) -> None:
    """Build the network from the folder alone and compare weights and answers, bit for bit."""
    fix = "give every argument that the network was built with"
    try:
        again = create_model(str(folder))
    except (ConfigError, DataError) as error:
        said = error.what.replace(f"{folder}/", "")
        what = f"timm's {architecture} with these model_args is another network ({said})"
        raise ConfigError(what, fix, field="model_args") from error
    for key, tensor in again.state_dict().items():
        if tensor.dtype != state[key].dtype or not torch.equal(tensor, state[key]):
            what = f"the export of {architecture} loads with another {key}"
            raise DataError(what, "export a float32 network")
    images = _probe(spec)
    # Memory format and attention kernel are choices for a machine, not of the network.
    reference = copy_network(network).to("cpu").to(memory_format=torch.contiguous_format)
    twins = dict(again.named_modules())
    for name, module in reference.named_modules():
        twin = twins.get(bare_key(f"{name}.").rstrip("."))
        if hasattr(twin, "fused_attn"):
            module.fused_attn = twin.fused_attn  # type: ignore[union-attr]
    if not torch.equal(_answers(reference, images), _answers(again, images)):
        what = "with these model_args holds the same weights and answers differently"
        raise ConfigError(f"timm's {architecture} {what}", fix, field="model_args")


def _probe(spec: InputSpec) -> Tensor:
    return torch.randn(2, 3, *spec.image_size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _answers(network: nn.Module, images: Tensor) -> Tensor:
    answer: Tensor = network.eval()(images)
    return answer


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    spec: InputSpec,
    classes: Sequence[str] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> float:
    """Write a single-file ONNX network with a free batch size; return its distance from torch's.

    The input is ``images`` float32 (B, 3, H, W), already normalised; the output ``logits`` (B, C).
    A distance above 1e-4 is a `DataError`, and nothing is written. The file's metadata hold the
    ``classes``, the ``origin`` and what ``spec`` says, as JSON.
    """
    try:
        _, _, runtime = map(importlib.import_module, ("onnx", "onnxscript", "onnxruntime"))
    except ImportError as error:
        what = f"ONNX export needs {error.name}"
        raise ConfigError(what, 'pip install "vitdistill[onnx]"') from error
    with _tracing(model, path, spec, "ONNX") as (network, images):
        # In memory: torch's own save would write the final name, and not atomically.
        program = torch.onnx.export(
            network,
            (images,),
            dynamo=True,
            external_data=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=_FREE_BATCH,
            verbose=False,
        )
        assert program is not None
        proto = program.model_proto
        for key, value in _about(spec, classes, origin).items():
            proto.metadata_props.add(key=key, value=json.dumps(value))
        data = proto.SerializeToString()  # above 2 GB, a ValueError
        session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(batch: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])

    return _write_equal(path, data, "ONNX", network, run, images)


def export_pt2(
    model: nn.Module,
    path: str | os.PathLike[str],
    spec: InputSpec,
    classes: Sequence[str] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> float:
    """Write a ``torch.export`` file with a free batch size; return its distance from the network.

    ``torch.export.load(path).module()`` answers ``images`` as in `export_onnx`; the extra file
    ``about.json`` says what an ONNX file's metadata say.
    """
    with _tracing(model, path, spec, "torch.export") as (network, images):
        program = torch.export.export(network, (images,), dynamic_shapes=_FREE_BATCH)
        file, about = io.BytesIO(), json.dumps(_about(spec, classes, origin))
        torch.export.save(program, file, extra_files={ABOUT: about})
        file.seek(0)
        loaded = torch.export.load(file).module()
    return _write_equal(path, file.getvalue(), "torch.export", network, loaded, images)


@contextmanager
def _tracing(
    model: nn.Module, path: str | os.PathLike[str], spec: InputSpec, kind: str
) -> Iterator[tuple[nn.Module, Tensor]]:
    """Yield a copy of the network to trace, and images; errors inside name ``kind``."""
    network = copy_network(_unwrapped(model)).to("cpu", torch.float32).eval()
    check_finite(network.state_dict(), f"the network for {path}")
    try:
        yield network, _probe(spec)
    except Exception as error:
        what = f"{type(network).__name__} cannot be exported to {kind} ({first_line(error)})"
        raise ConfigError(what, "export for timm") from error


def _write_equal(
    path: str | os.PathLike[str],
    data: bytes,
    kind: str,
    network: nn.Module,
    exported: Callable[[Tensor], Tensor],
    images: Tensor,
) -> float:
    """Write the exported network if it answers as the original does; return the distance.

    That is the largest absolute difference of logits over batches of 1 and 3.
    """
    off = 0.0
    for batch in (images[:1], torch.cat([images, images[:1].flip(-1)])):
        distance = (exported(batch) - _answers(network, batch)).abs().max().item()
        if not distance <= TOLERANCE:  # NaN fails too
            far = f"{distance:.3g} away from torch's, more than {TOLERANCE:g}"
            what = f"the {kind} network's logits are {far}; nothing was written"
            raise DataError(what, "export for timm")
        off = max(off, distance)
    atomic.write_atomic(path, data)
    return off


def _about(
    spec: InputSpec, classes: Sequence[str] | None, origin: Mapping[str, Any] | None
) -> dict[str, Any]:
    named = {} if classes is None else {"classes": list(classes)}
    return {**asdict(spec), **named, "vitdistill": {"version": __version__, **(origin or {})}}


def push(
    model: nn.Module,
    repository: str,
    card: str,
    *,
    model_args: Mapping[str, Any],
    origin: Mapping[str, Any],
    private: bool = False,
) -> str:
    """Put an exported network on the Hugging Face hub by timm's own `push_to_hf_hub`.

    The ``card`` becomes its README.md, unless there is one. Return the address.

    Raises:
        ConfigError: the hub cannot be reached, or refuses; its own words are passed on.
    """
    api = huggingface_hub.HfApi()
    record = {"version": __version__, **origin}
    try:
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        if not api.file_exists(repository, "README.md"):
            # timm's own card would claim a licence.
            api.upload_file(
                path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=repository
            )
        timm.models.push_to_hf_hub(
            model,
            repository,
            private=private,
            model_args=dict(model_args),
            model_config={"vitdistill": record},
            safe_serialization=True,
        )
    except Exception as error:  # of the hub's client, its transport, its validation
        what = f"{repository} cannot be pushed ({first_line(error)})"
        fix = "log in by 'hf auth login' with a token that may write, and check the network"
        raise ConfigError(what, fix, field="push") from error
    return f"{huggingface_hub.constants.ENDPOINT}/{repository}"
