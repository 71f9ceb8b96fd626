"""``vitdistill export``."""

from pathlib import Path
from typing import Any

from ..data.model_input import input_spec_of
from ..errors import ConfigError, Give
from ..runs.identity import resolve_run
from ..storage.atomic import write_atomic
from ..weights import create as weights
from ..weights.export import export_onnx, export_pt2, export_timm, push
from ..weights.origin import LINEAGE, origin_of
from ..weights.outside import is_outside
from .arguments import ExportArguments
from .card import CARD, loading, model_card
from .console import say


def run(args: ExportArguments) -> int:
    folder = resolve_run(args.model, (args.weights,) if args.weights else ("best", "last"))
    if not Path(folder.removeprefix("local-dir:")).is_dir():
        what = f"there is no run or export folder {args.model}"
        raise ConfigError(what, "give a run, or a folder with a config.json", field="model")
    saved = weights.read_saved(folder)
    assert saved is not None
    _check(args)
    if folder != args.model:
        say(f"exporting {folder}")
    elif args.weights is not None:
        what = f"{folder} is no run that has best and last weights"
        raise ConfigError(what, Give("weights", "none"))
    model = weights.create_model(folder).eval()
    if args.push is not None and is_outside(saved.architecture):
        what = f"timm does not know {saved.architecture}, and so cannot push it"
        raise ConfigError(what, Give("output"), field="push")
    spec, classes = input_spec_of(model), weights.class_names(model)
    origin: Any = {key: saved.record[key] for key in LINEAGE if key in saved.record}
    if not saved.record:  # others' weights are what it began from
        origin = {"began_from": origin_of(folder)}
    built: dict[str, Any] = {"model_args": saved.args, "origin": origin}
    named = args.push or Path(args.output or args.model).name
    wanted = args.card or args.push is not None
    card = model_card(model, Path(folder), named, saved, origin) if wanted else ""
    if args.output is not None:
        given: dict[str, Any] = {"classes": classes, "input_spec": spec}
        export_timm(model, args.output, architecture=saved.architecture, **built, **given)
        say(f"wrote {args.output}: load it with {_loading(saved.architecture, args.output)}")
        if args.card:
            write_atomic(Path(args.output) / CARD, card.encode())
            say(f"wrote {Path(args.output) / CARD}: its licence is left for you to fill in")
    for path, export in ((args.onnx, export_onnx), (args.pt2, export_pt2)):
        if path is not None:
            off = export(model, path, spec, classes, origin)
            height, width = spec.image_size
            say(
                f"wrote {path}: input 'images' float32 (B, 3, {height}, {width}) normalised by"
                f" mean {spec.mean} and std {spec.std}; largest difference from torch {off:.1e}",
                fold=True,
            )
    if args.push is not None:
        address = push(model, args.push, card, **built, private=args.private)
        say(
            f"pushed to {address}: load it with {_loading(saved.architecture, args.push, 'hf-hub')}"
        )
    return 0


def _check(args: ExportArguments) -> None:
    """Raise `ConfigError` unless there is something to write, and room for it."""
    files = {"onnx": args.onnx, "pt2": args.pt2}
    if not (args.output or args.push or any(files.values())):
        fixes = tuple(map(Give, ("output", "push", *files)))
        raise ConfigError("nothing to write", fixes, field="output")
    for name, path in files.items():
        if path is not None and Path(path).exists():
            raise ConfigError(f"{path} exists already", Give(name), field=name)
    if args.output is not None and Path(args.output).is_dir() and any(Path(args.output).iterdir()):
        raise ConfigError(f"{args.output} is not empty", Give("output"), field="output")
    if args.card and args.output is None:
        raise ConfigError("a card is written beside weights", Give("output"), field="card")
    if args.private and args.push is None:
        raise ConfigError("only what is pushed can be private", Give("push"), field="private")


def _loading(architecture: str, place: str, scheme: str = "local-dir") -> str:
    call, module = loading(architecture, place, scheme)
    unknown = f", after 'import {module}', because plain timm does not know {architecture}"
    return call + (unknown if module and not is_outside(architecture) else "")
