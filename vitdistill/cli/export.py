"""``vitdistill export``."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from timm.models import model_entrypoint
from tyro.conf import Positional

from ..data.model_input import input_spec_of
from ..errors import ConfigError
from ..runs.identity import resolve_run
from ..weights import create as weights
from ..weights.export import export_onnx, export_timm
from .flags import TEXT, about, parse_flags, wrap


@dataclass
class ExportFlags:
    """Flags of ``export``."""

    model: Positional[
        Annotated[
            str,
            TEXT,
            about(
                "a run folder (its best weights), or a folder with config.json such as RUN/last",
                metavar="RUN",
            ),
        ]
    ] = field(metadata={"positional": "RUN"})
    output: Annotated[
        str | None, TEXT, about("folder to write for timm: config.json and model.safetensors")
    ] = None
    onnx: Annotated[
        str | None, TEXT, about("file to write as ONNX (needs pip install 'vitdistill[onnx]')")
    ] = None


def main(words: Sequence[str]) -> int:
    """Write a run's student where other tools load it."""
    description = (
        "Write a run's student as a folder that timm loads with the same answers,"
        " timm.create_model('local-dir:FOLDER', pretrained=True), or as an ONNX file checked"
        " against torch. There is no teacher and no adapter in it."
    )
    flags = parse_flags(ExportFlags, words, "vitdistill export", wrap(description))
    if flags.output is None and flags.onnx is None:
        raise ConfigError("nothing to write: give --output FOLDER for timm, --onnx FILE, or both")
    folder = resolve_run(flags.model)
    if not Path(folder.removeprefix("local-dir:")).is_dir():
        raise ConfigError(f"there is no run or export folder {flags.model}")
    if flags.onnx is not None and Path(flags.onnx).exists():
        raise ConfigError(f"{flags.onnx} exists already: name another file with --onnx")
    if (
        flags.output is not None
        and Path(flags.output).is_dir()
        and any(Path(flags.output).iterdir())
    ):
        raise ConfigError(f"{flags.output} is not empty: name another folder with --output")
    model = weights.create_model(folder).eval()
    spec = input_spec_of(model)
    classes = weights.class_names(model)
    if flags.output is not None:
        architecture, args = weights.describe(folder, {})
        export_timm(
            model,
            flags.output,
            architecture=architecture,
            model_args=args,
            classes=classes,
            input_spec=spec,
        )
        file = model_entrypoint(architecture.partition(".")[0]).__module__
        first = (
            ""
            if file.startswith("timm.")
            else f", after 'import {file}', because plain timm does not know {architecture}"
        )
        print(
            f"wrote {flags.output}: load it with timm.create_model('local-dir:{flags.output}',"
            f" pretrained=True){first}"
        )
    if flags.onnx is not None:
        off = export_onnx(model, flags.onnx, spec)
        height, width = spec.image_size
        print(
            f"wrote {flags.onnx}: input 'images' float32 (B, 3, {height}, {width}) normalised by"
            f" mean {spec.mean} and std {spec.std}; largest difference from torch {off:.1e}"
        )
    return 0
