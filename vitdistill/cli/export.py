"""``vitdistill export``."""

from pathlib import Path

from timm.models import model_entrypoint
from torch import nn

from ..data.model_input import input_spec_of
from ..errors import ConfigError, Give
from ..runs.identity import resolve_run
from ..weights import create as weights
from ..weights.export import export_onnx, export_timm
from ..weights.outside import is_outside
from .arguments import ExportArguments
from .say import say


def run(args: ExportArguments) -> int:
    """Write a run's student where other tools load it."""
    _check(args)
    folder = resolve_run(args.model)
    if not Path(folder.removeprefix("local-dir:")).is_dir():
        raise ConfigError(f"there is no run or export folder {args.model}", field="model")
    model = weights.create_model(folder).eval()
    if args.output is not None:
        _export_timm(model, folder, args.output)
    if args.onnx is not None:
        spec = input_spec_of(model)
        off = export_onnx(model, args.onnx, spec, weights.class_names(model))
        height, width = spec.image_size
        say(
            f"wrote {args.onnx}: input 'images' float32 (B, 3, {height}, {width}) normalised by"
            f" mean {spec.mean} and std {spec.std}; largest difference from torch {off:.1e}"
        )
    return 0


def _check(args: ExportArguments) -> None:
    """Raise `ConfigError` unless there is something to write, and room for it."""
    fixes = {"output": Give("output", "FOLDER"), "onnx": Give("onnx", "FILE")}
    if args.output is None and args.onnx is None:
        raise ConfigError("nothing to write", tuple(fixes.values()), field="output")
    if args.onnx is not None and Path(args.onnx).exists():
        raise ConfigError(f"{args.onnx} exists already", fixes["onnx"], field="onnx")
    if args.output is not None and Path(args.output).is_dir() and any(Path(args.output).iterdir()):
        raise ConfigError(f"{args.output} is not empty", fixes["output"], field="output")


def _export_timm(model: nn.Module, folder: str, output: str) -> None:
    architecture, model_args = weights.describe(folder, {})
    export_timm(
        model,
        output,
        architecture=architecture,
        model_args=model_args,
        classes=weights.class_names(model),
        input_spec=input_spec_of(model),
    )
    if is_outside(architecture):
        say(f"wrote {output}: load it with vitdistill.create_model({output!r})")
        return
    file = model_entrypoint(architecture.partition(".")[0]).__module__
    unknown = f", after 'import {file}', because plain timm does not know {architecture}"
    first = "" if file.startswith("timm.") else unknown
    load = f"timm.create_model({f'local-dir:{output}'!r}, pretrained=True){first}"
    say(f"wrote {output}: load it with {load}")
