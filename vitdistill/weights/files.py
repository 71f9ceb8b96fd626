"""Weights files read as tensors, without executing anything in them.

``.safetensors`` holds tensors only. PyTorch's formats are pickles, which can hold code: they are
read by torch's own restricted reader, and refused if they hold more than tensors.
"""

import json
import os
import pickle
import re
import shlex
import warnings
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..errors import DataError
from ..messages import first_line, listed, printable
from ..storage.atomic import disk_errors

# Where public checkpoints keep their weights, best first: an average before the last ones, as timm.
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema")
_LAST = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module")
_WRAPPERS = (*_AVERAGES, *_LAST, "params", "weights")
_PREFIXES = ("module.", "_orig_mod.")
_PICKLES = (".pth", ".pt", ".bin", ".tar", ".ckpt")
# Prefixes of Lightning's modules and the like, and of transformers' wrapper of timm's networks.
_ATTRIBUTES = ("model.", "net.", "network.", "backbone.", "timm_model.")


def load_state_dict(path: str | os.PathLike[str], own: Collection[str] = ()) -> dict[str, Tensor]:
    """Read the tensors of a weights file, on the CPU, without a training script's wrappers.

    Reads ``.safetensors``, and ``.pth .pt .bin .tar .ckpt`` of tensors only; else `DataError`.
    Names in ``own``, the network's, are not taken for a wrapper's.
    """
    check_is_file(path)
    file = Path(path)
    with disk_errors(file), open(file, "rb") as opened:
        head = opened.read(512)
    _refuse_failed_download(file, head)
    if file.suffix not in (".safetensors", *_PICKLES):
        what = f"{file} is no weights file that can be read"
        raise DataError(what, fix="convert to .safetensors")
    # Some publish safetensors under PyTorch's suffixes: the content tells.
    is_safe = head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= file.stat().st_size - 8
    if file.suffix != ".safetensors" and not is_safe:
        return _unwrapped(file, _read_pickle(file), own)
    try:
        return _unwrapped(file, safetensors.torch.load_file(file), own)
    except safetensors.SafetensorError as error:
        raise _unreadable(file, error) from error


def check_is_file(path: str | os.PathLike[str]) -> None:
    """Raise `DataError` where there is no regular file: reading a pipe would wait for ever."""
    if Path(path).is_dir():
        what = f"{path} is a folder, not a weights file"
        raise DataError(what, ("give it as the model's name", "name the file in it"))
    if not Path(path).is_file():
        raise DataError(f"there is no weights file {path}")


def is_weights(path: str | os.PathLike[str]) -> bool:
    """Return whether there is a file of tensors alone, and not of a program (TorchScript)."""
    file = Path(path)
    if file.suffix not in (".safetensors", *_PICKLES) or not file.is_file():
        return False
    names = zipfile.ZipFile(file).namelist() if zipfile.is_zipfile(file) else []
    return not any(name.endswith("/constants.pkl") for name in names)


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Raise `DataError` where tensors hold NaN or infinity; ``where`` names their file."""
    floats = (key for key, value in state.items() if value.is_floating_point())
    wrong = [key for key in floats if not bool(state[key].float().isfinite().all())]
    if wrong:
        what = f"{where} holds numbers that are not finite, in {listed(wrong)}"
        raise DataError(what, "use the weights of an earlier checkpoint")


def _refuse_failed_download(file: Path, head: bytes) -> None:
    what = ""
    if not head:
        what = "empty"
    elif head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":
        what = "a web page"
    elif head.startswith(b"version https://git-lfs"):
        what = "a Git LFS pointer"
    if what:
        raise DataError(f"{file} is {what}, not weights", fix="download the file itself")


def _read_pickle(file: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    # A damaged file may fail anywhere in the reader (struct.error, KeyError, ...).
    except Exception as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if "TorchScript" in str(error) or (asked and isinstance(error, pickle.UnpicklingError)):
            code = (
                f"a pickle of more than tensors ({asked[1]})" if asked else "a TorchScript program"
            )
            what = f"{file} is {code}, and was not executed"
            fix = f"if you trust its source, convert it: {_converter(file)}"
            raise DataError(what, fix) from error
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> DataError:
    what = f"{file} is cut short, damaged or no weights file ({first_line(error)})"
    return DataError(what, "download it again")


def _converter(file: Path, keys: Sequence[str] = _WRAPPERS) -> str:
    """Return a command that extracts what `_unwrapped` would, or what is under ``keys``."""
    code = (
        "import sys, torch, safetensors.torch as s; "
        'd = torch.load(sys.argv[1], map_location="cpu", weights_only=False); '
        "f = lambda d: d.state_dict() if isinstance(d, torch.nn.Module) else d; "
        'm = lambda d: hasattr(d, "keys"); '
        "t = lambda d: m(d) and all(isinstance(v, torch.Tensor) for v in d.values()); "
        f"g = lambda d: next((f(d[k]) for p in (t, m) for k in {json.dumps(keys)}"
        " if p(f(d.get(k)))), d); "
        "s.save_file({k: v.detach().clone().contiguous() for k, v in g(g(f(d))).items()"
        " if isinstance(v, torch.Tensor)}, sys.argv[2])"
    )
    files = (file, file.with_suffix(".safetensors"))
    return shlex.join(["python", "-c", code, *map(printable, files)])


def _unwrapped(file: Path, found: Any, own: Collection[str]) -> dict[str, Tensor]:
    found = found if isinstance(found, Mapping) else {}
    others = [str(key) for key, value in found.items() if _is_state(value)]
    for _ in range(2):  # {"model": {"state_dict": ...}} is wrapped twice
        inner = [found[key] for key in _WRAPPERS if isinstance(found.get(key), Mapping)]
        found = next(filter(_is_state, inner), inner[0] if inner else found)
    if not _is_state(found):
        what = f"{file} holds no weights"
        if not others:
            raise DataError(f"{what}: named tensors were expected")
        command = f"to use those under {others[0]!r}, convert it: {_converter(file, others[:1])}"
        raise DataError(f"{what} under a known name, but some under {listed(others)}", command)
    bare = {key if key in own else bare_key(key): value for key, value in found.items()}
    for prefix in () if {*own} & bare.keys() else _ATTRIBUTES:
        if all(key.startswith(prefix) for key in bare):
            bare = {bare_key(key.removeprefix(prefix)): value for key, value in bare.items()}
            break
    if len(bare) < len(found):
        raise DataError(f"{file} holds tensors twice, with and without a prefix")
    return bare


def _is_state(found: Any) -> bool:
    return (
        isinstance(found, Mapping)
        and bool(found)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items())
    )


def bare_key(key: str) -> str:
    """Return a tensor's name without what torch.compile and DistributedDataParallel put in it."""
    key = key.replace("._orig_mod.", ".")
    while key.startswith(_PREFIXES):
        key = key.split(".", 1)[1]
    return key
