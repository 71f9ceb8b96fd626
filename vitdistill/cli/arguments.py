"""What each command takes, known without torch or timm: mistyped flags and help cost no time."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal

from ..option import Scope, option
from ..recipes.settings import settings_with_flags
from .flags import Flag, Groups, flags_of

DEFAULT_RECIPE = "maskedkd"
DEVICE = "auto, cpu, cuda or cuda:N"
GROUPS = {
    "data": "data.",
    "student": "student.",
    "teacher": "teachers.",
    "loss": "objectives.",
    "optimizer": "optim.",
    "augmentation": "data.augment.",
    "loop": "train.",
}
"""Headings of the help, and where in the recipe their flags lead."""


@dataclass(frozen=True, kw_only=True)
class NoArguments:
    """Nothing."""


@dataclass(frozen=True, kw_only=True)
class RecipeArguments:
    """A recipe, and what is changed of it.

    Args:
        settings: values that flags give, by the recipe's field.
    """

    recipe: str = option(
        DEFAULT_RECIPE, "a recipe's name, a YAML file, or a run's folder", "RECIPE"
    )
    labels: str | None = option(
        None,
        "stored labels to read in place of running it, as 'vitdistill label' wrote them; for all"
        " teachers at once",
        "--labels",
        metavar="FOLDER",
        stages="taught",
    )
    distillation_alpha: float | None = option(
        None, "DeiT's alpha: --kd-weight alpha and --ce-weight 1 - alpha", "--distillation-alpha"
    )
    with_: tuple[str, ...] = option(
        (),
        "methods to add (docs/methods.md); a selector or a masking replaces the recipe's;"
        " METHOD:NAME reads, or chooses for, the teacher of that name; in stages: STAGE.METHOD",
        "--with",
        metavar="METHOD[:TEACHER] ...",
    )
    without: tuple[str, ...] = option(
        (),
        "objectives or teachers to drop, or 'selector', or 'masking'; in stages: STAGE.NAME",
        "--without",
        metavar="NAME ...",
    )
    set: tuple[str, ...] = option(
        (),
        "any field of the recipe ('explain --recipe-yaml' shows all), e.g."
        " student.model_args.depth=6; in stages: STAGE.FIELD=VALUE",
        "--set",
        metavar="FIELD=VALUE ...",
    )
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainArguments(RecipeArguments):
    output: str | None = option(
        None,
        "the run folder; none: runs/RECIPE, or RECIPE itself if it is a run's folder. A run there"
        " is resumed, never overwritten",
        "--output",
        metavar="FOLDER",
    )
    device: str = option("auto", DEVICE, "--device")
    stage: str | None = option(
        None, "of a recipe in stages, the one to stop after; none: the last", "--stage"
    )


@dataclass(frozen=True, kw_only=True)
class ExplainArguments(RecipeArguments):
    time: bool = option(
        False, "run a few steps here (random images and weights), print the hours implied", "--time"
    )
    device: str | None = option(
        None, "for --time: cpu, cuda or cuda:N; none: the best there is", "--device"
    )
    recipe_yaml: bool = option(False, "print the resolved recipe as YAML instead", "--recipe-yaml")


@dataclass(frozen=True, kw_only=True)
class LabelArguments(RecipeArguments):
    output: str | None = option(
        None,
        "the folder; a teacher's labels go into one of its name there; none: labels/RECIPE",
        "--output",
        metavar="FOLDER",
    )
    encoding: Literal["auto", "float32", "float16", "topk"] = option(
        "auto",
        "of the logits; auto: float16 up to 256 classes, else the k largest and the mass of the"
        " others (topk)",
        "--encoding",
    )
    k: int | None = option(None, "classes an image that topk keeps; none: 10", "--k")
    temperatures: tuple[float, ...] = option(
        (),
        "at which topk is right; none: those of the recipe's objectives",
        "--temperatures",
        metavar="T ...",
    )
    hidden_dtype: Literal["float16", "float32"] | None = option(
        None, "of hidden states the recipe reads; none: float16", "--hidden-dtype"
    )
    part_size: int = option(
        16384,
        "images a part: what one process writes at a time, and a crash can cost",
        "--part-size",
    )
    device: str = option("auto", DEVICE, "--device")


@dataclass(frozen=True, kw_only=True)
class StoreArguments:
    store: str = option(MISSING, "a teacher's labels, or a folder of several teachers'", "FOLDER")


@dataclass(frozen=True, kw_only=True)
class CheckArguments(StoreArguments):
    samples: int = option(256, "how many (view, image) to answer anew", "--samples", at_least=1)
    data_dir: str | None = option(
        None, "where the images are now; none: where they were", "--data-dir", metavar="FOLDER"
    )
    teacher_model: str | None = option(None, "the teacher; none: where it was", "--teacher-model")
    device: str = option("auto", DEVICE, "--device")


@dataclass(frozen=True, kw_only=True)
class MergeArguments:
    target: str = option(MISSING, "the folder to write; it may have parts already", "TARGET")
    from_: tuple[str, ...] = option(
        MISSING, "labels of one teacher that were written apart", "--from", metavar="FOLDER ..."
    )


@dataclass(frozen=True, kw_only=True)
class PruneArguments(StoreArguments):
    to: str = option(MISSING, "the folder to write", "--to", metavar="FOLDER")
    views: int | None = option(None, "keep the first so many views; none: all", "--views")
    k: int | None = option(
        None, "largest classes of an image to keep; none: all that are stored, or 10", "--k"
    )
    encoding: Literal["float16", "topk"] | None = option(
        None, "store logits so instead; none: as they are", "--encoding"
    )
    temperatures: tuple[float, ...] = option(
        (),
        "of --encoding topk; none: those that are stored, or 1",
        "--temperatures",
        metavar="T ...",
    )


@dataclass(frozen=True, kw_only=True)
class LabelExportArguments(StoreArguments):
    to: str = option(MISSING, "the .parquet file to write", "--to", metavar="FILE")
    views: tuple[int, ...] = option((), "which views; none: all", "--views", metavar="N ...")


@dataclass(frozen=True, kw_only=True)
class EvalArguments:
    model: str = option(MISSING, "a run or export folder, timm name, or hf-hub:ORG/NAME", "MODEL")
    data_dir: str = option(
        MISSING,
        "images: a folder or tar with val/, parquet files, hfds/NAME, torchvision/NAME?root=DIR",
        "--data-dir",
        metavar="FOLDER",
    )
    model_path: str | None = option(
        None,
        "its weights (.safetensors, .pth)",
        "--model-path",
        metavar="FILE",
        field="teachers.model.checkpoint",
    )
    pretrained: bool = option(
        False, "take timm's pretrained weights", "--pretrained", field="teachers.model.pretrained"
    )
    img_size: int | None = option(
        None,
        "side of its square input, pixels; none: its own",
        "--img-size",
        metavar="PIXELS",
        field="teachers.model.image_size",
    )
    reorder_classes: bool = option(
        False,
        "accept its classes, and the teacher's, in another order, matched by name",
        "--reorder-classes",
        field="teachers.model.reorder_classes",
    )
    knn: int | None = option(
        None,
        "judge its features by the K nearest training images (Wu et al. 2018); no K: 20",
        "--knn",
        metavar="[K]",
        alone="20",
        at_least=1,
    )
    linear_probe: bool = option(
        False, "judge its features by a linear classifier trained on them", "--linear-probe"
    )
    pool: Literal["mean", "class"] | None = option(
        None, "features of an image: mean of its patches or class token; none: mean", "--pool"
    )
    teacher_model: str | None = option(
        None, "a teacher to compare its answers with", "--teacher-model"
    )
    teacher_path: str | None = option(
        None, "the teacher's weights", "--teacher-path", metavar="FILE"
    )
    teacher_pretrained: bool = option(
        False, "take timm's pretrained weights for the teacher", "--teacher-pretrained"
    )
    split: Literal["val", "train"] = option("val", "which images", "--split")
    batch_size: int = option(
        256, "images a step and process", "--batch-size", aliases=("-b",), at_least=1
    )
    workers: int = option(2, "loader processes", "--workers", aliases=("-j",), at_least=0)
    amp_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "precision; auto: bfloat16 on a GPU, float32 on a CPU", "--amp-dtype"
    )
    device: str = option("auto", DEVICE, "--device")
    json: bool = option(False, "print one line of JSON instead of a table", "--json")


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    model: str = option(
        MISSING,
        "a run folder (its best weights), or a folder with config.json such as RUN/last",
        "RUN",
    )
    output: str | None = option(
        None,
        "folder to write for timm: config.json and model.safetensors",
        "--output",
        metavar="FOLDER",
    )
    onnx: str | None = option(
        None,
        "file to write as ONNX (needs pip install 'vitdistill[onnx]')",
        "--onnx",
        metavar="FILE",
    )


@dataclass(frozen=True, kw_only=True)
class DemoArguments:
    output: str = option(
        "runs/demo",
        "folder for images, runs and picture; finished runs in it are not repeated",
        "--output",
        metavar="FOLDER",
    )


def recipe_flags() -> dict[str, Flag]:
    """Return the flags that change a recipe, by its field."""
    return {s.path: Flag(s.path, s.kind, s.option) for s in settings_with_flags()}


def groups_of(arguments: type) -> Groups:
    """Return the flags of a command under the headings of its help."""
    flags = list(flags_of(arguments))
    words = {"arguments": [flag for flag in flags if flag.positional]}
    named = [flag for flag in flags if not flag.positional]
    if not issubclass(arguments, RecipeArguments):
        return {**words, "flags": named}
    groups: dict[str, list[Flag]] = {**words, **{title: [] for title in GROUPS}}
    for path, flag in recipe_flags().items():
        fitting = [title for title, start in GROUPS.items() if f"{path}.".startswith(start)]
        groups[fitting[-1] if fitting else "teacher"].append(flag)
    own = {flag.dest: flag for flag in named}
    groups["teacher"].append(own.pop("labels"))
    groups["loss"] += [own.pop(name) for name in ("distillation_alpha", "with_", "without")]
    groups["other"] = [*own.values()]
    return groups


def scopes() -> dict[Scope, list[str]]:
    """Return the flags of a recipe by the stages of a staged recipe that they set."""
    found: dict[Scope, list[str]] = {"every": [], "first": [], "taught": [], "one": []}
    for flag in recipe_flags().values():
        found[flag.option.stages].append(flag.name)
    return found
