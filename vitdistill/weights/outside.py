"""Networks that timm does not build: of the user's own code, of torchvision, and files that run."""

import importlib
import inspect
import json
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from ..errors import ConfigError, DataError, UserError
from ..messages import first_line, printable, suggest
from ..storage.atomic import sha256_file
from .adopted import Called, adopt
from .files import check_is_file
from .from_torchvision import NAME as TORCHVISION
from .from_torchvision import build_torchvision
from .transformers_network import NAME as TRANSFORMERS
from .transformers_network import build_transformers

_FACTORY = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")
_SCRIPTS = (".pt", ".pth", ".ts", ".torchscript")


def is_outside(name: str) -> bool:
    """Return whether a network of this name is built here, not by timm."""
    of_library = name.startswith((TRANSFORMERS, TORCHVISION))
    return of_library or is_program(name) or bool(_FACTORY.fullmatch(name))


def is_program(name: str) -> bool:
    """Return whether a network's name is that of a file that runs, such as ONNX."""
    return name.endswith((".onnx", ".pt2", *_SCRIPTS))


def build_outside(
    name: str, args: Mapping[str, Any], cfg: Mapping[str, Any] | None = None
) -> nn.Module:
    """Build a network that is none of timm's, on the CPU.

    Args:
        args: ``num_classes``, ``img_size`` and ``pretrained_cfg_overlay`` as timm takes them, and
            the network's own.
        cfg: its ``pretrained_cfg``, where a config.json names it.
    """
    args, sides = dict(args), tuple((cfg or {}).get("input_size") or ())[1:]
    if sides and "img_size" not in args:
        args["img_size"] = sides[0] if len({*sides}) == 1 else sides
    overlay, size = args.pop("pretrained_cfg_overlay", None), args.get("img_size")
    wanted = args.get("num_classes")
    with torch.device("cpu"):  # somebody's code need not know of meta tensors
        if is_program(name):
            network: Any = _open_program(Path(name))
        elif name.startswith(TRANSFORMERS):
            network = build_transformers(args["config"], wanted, to_2tuple(size))
        elif name.startswith(TORCHVISION):
            options = {key: args[key] for key in args.keys() - {"img_size", "num_classes"}}
            network = build_torchvision(name, wanted, **options)
        else:
            factory = _find_factory(name, own_code_only=cfg is not None)
            network = factory(**_taken(factory, args))
    known = {key: value for key, value in (cfg or {}).items() if key != "num_classes"}
    model = adopt(network, printable(name), {**known, **(overlay or {})}, size)
    if wanted and wanted != model.num_classes:
        what = f"{name} answers in {model.num_classes} classes, not in {wanted}"
        raise ConfigError(what, "have it take num_classes")
    return model


def _taken(factory: Callable[..., Any], args: Mapping[str, Any]) -> dict[str, Any]:
    """Drop from ``args`` the number of classes and the size if ``factory`` does not take them."""
    parameters = inspect.signature(factory).parameters
    takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    optional = () if takes_all else {"num_classes", "img_size"} - parameters.keys()
    return {key: value for key, value in args.items() if key not in optional}


def _find_factory(name: str, own_code_only: bool) -> Callable[..., Any]:
    """Import what ``package.module:factory`` names, from the current directory too.

    ``own_code_only``: name and arguments are from a config.json, which anybody may have written.
    """
    module_name, _, attribute = name.partition(":")
    here = Path.cwd()
    if str(here) not in sys.path:  # as ``python -m`` has it
        sys.path.insert(0, str(here))
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever its code raises
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(
            f"{error.name}."
        ):
            what = f"there is no module {error.name}, from which {name} would be built"
            raise ConfigError(what, "start in the folder that has it, or install it") from error
        what = f"{module_name} cannot be imported ({type(error).__name__}: {first_line(error)})"
        raise ConfigError(what) from error
    known = [key for key, value in vars(found).items() if callable(value)]
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        what = f"{module_name} has nothing called {attribute} that builds a network"
        raise ConfigError(what, suggest(attribute, known, "define it there"))
    home = Path(getattr(sys.modules.get(found.__module__), "__file__", None) or "/").resolve()
    if own_code_only and not (home.is_relative_to(here) and "site-packages" not in home.parts):
        raise ConfigError(
            f"a config.json asks for {name}, which is no code of the current directory's",
            "start in the folder that has it, or name it yourself, and its weights as a checkpoint",
        )
    return found


# -- files that run -------------------------------------------------------------------------------


def _open_program(file: Path) -> Called:
    """Open an ONNX, ``torch.export`` or TorchScript file, whose user vouches for it."""
    check_is_file(file)
    about: dict[str, Any] = {}
    try:
        if file.suffix == ".onnx":
            call, about = _open_onnx(file)
        elif file.suffix == ".pt2":
            call = _on_its_device(torch.export.load(file).module())
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch calls TorchScript deprecated
                call = _on_its_device(torch.jit.load(file, map_location="cpu").eval())
    except UserError:
        raise
    except Exception as error:  # whatever a reader says of a file of another kind
        what = f"{file} is no network that can be run ({first_line(error)})"
        fix = "if it holds weights, name their network, and give it as the checkpoint"
        raise DataError(what, fix) from error
    network = Called(call, printable(file), sha256_file(file))
    network.pretrained_cfg = about
    return network


def _on_its_device(module: nn.Module) -> Callable[[Tensor], Any]:
    return lambda images: module.to(images.device)(images)


def _open_onnx(file: Path) -> tuple[Callable[[Tensor], Any], dict[str, Any]]:
    """Return how to run an ONNX file, and what its shapes and our own metadata say of its input."""
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError as error:
        what = f"{file} needs {error.name}"
        raise ConfigError(what, 'pip install "vitdistill[onnx]"') from error
    session = runtime.InferenceSession(str(file), providers=runtime.get_available_providers())
    given, outputs = session.get_inputs()[0], [output.name for output in session.get_outputs()]
    wanted = ["logits" if "logits" in outputs else outputs[0]]
    dtype = torch.float16 if "float16" in given.type else torch.float32
    batch, _, *sides = given.shape

    def run(images: Tensor) -> Tensor:
        parts = images.to("cpu", dtype).split(batch if isinstance(batch, int) else len(images))
        answers = [session.run(wanted, {given.name: part.numpy()})[0] for part in parts]
        return torch.from_numpy(numpy.concatenate(answers)).float()

    said = {key: json.loads(v) for key, v in session.get_modelmeta().custom_metadata_map.items()}
    about = {key: said[key] for key in ("mean", "std", "crop_pct", "crop_mode") if key in said}
    about |= {"label_names": said["classes"]} if "classes" in said else {}
    if all(isinstance(side, int) for side in sides):
        about["input_size"] = (3, *sides)
    return run, about
