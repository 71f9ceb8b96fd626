"""What each command takes, known without torch or timm: mistyped flags and help cost no time.

The first paragraph of a class is the command's line in the overview, all of it stands in its help.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal

from ..option import option, options_of
from ..recipes.settings import LabelOptions, TeacherConfig, settings_with_flags
from .flags import Flag, Groups, flags_of


def _device() -> Any:
    return option("auto", "auto, cpu, cuda or cuda:N", "--device")


def _of_teacher(name: str, flag: str) -> Any:
    """Declare an argument of ``eval``: its model is described as a teacher is."""
    default = TeacherConfig.__dataclass_fields__[name].default
    help = options_of(TeacherConfig)[name].help
    return option(default, help, flag, field=f"teachers.model.{name}")


@dataclass(frozen=True, kw_only=True)
class RecipesArguments:
    """the named recipes, a line each"""


@dataclass(frozen=True, kw_only=True)
class RecipeArguments:
    """A recipe, and what is changed of it."""

    recipe: str = option("maskedkd", "a name, a YAML file, or a run's folder", "RECIPE")
    labels: str | None = option(
        None, "labels to read in place of running teachers ('vitdistill label')", "--labels FOLDER"
    )
    with_: tuple[str, ...] = option(
        (),
        "methods to add, as in the recipe of that name; a selector or masking replaces the"
        " recipe's; METHOD:NAME is for the teacher of that name; in stages: STAGE.METHOD",
        "--with METHOD[:TEACHER]",
    )
    without: tuple[str, ...] = option(
        (),
        "objectives or teachers to drop, or 'selector', or 'masking'; in stages: STAGE.NAME",
        "--without NAME",
    )
    set: tuple[str, ...] = option(
        (),
        "any field of the recipe, e.g. student.model_args.depth=6 ('explain --recipe-yaml' shows"
        " all); in stages: STAGE.FIELD=VALUE",
        "--set FIELD=VALUE",
    )
    settings: Mapping[str, Any] = field(default_factory=dict)  # of flags, by the recipe's field


@dataclass(frozen=True, kw_only=True)
class TrainArguments(RecipeArguments):
    """train a student, alone or from a teacher; the same command resumes a run"""

    output: str | None = option(
        None,
        "the run folder; none: runs/RECIPE. A run there is resumed, never overwritten",
        "--output --output-dir FOLDER",
    )
    device: str = _device()
    stage: str | None = option(None, "of a recipe in stages, the one to stop after", "--stage")


@dataclass(frozen=True, kw_only=True)
class ExplainArguments(RecipeArguments):
    """what a run will compute and cost, before it runs

    No weights are read and nothing is written.
    """

    output: str | None = option(
        None, "as for train: prints whether the run would start, resume or be refused", "--output"
    )
    time: bool = option(False, "time a few steps here, print the hours implied", "--time")
    device: str | None = option(None, "for --time: cpu, cuda or cuda:N", "--device")
    recipe_yaml: bool = option(False, "print the resolved recipe as YAML instead", "--recipe-yaml")


@dataclass(frozen=True, kw_only=True)
class LabelArguments(RecipeArguments, LabelOptions):
    """store a teacher's answers once, so that training needs no teacher

    Run a recipe's teachers once, over the very views its student will see, and store what they say.
    Training with --labels then needs no teacher. The same command goes on where it was stopped, in
    any number of processes at once.

    With labels that exist: vitdistill label status | info | verify | check | merge | prune | export
    """

    output: str | None = option(
        None, "where each teacher gets a folder of its name; none: labels/RECIPE", "--output FOLDER"
    )
    device: str = _device()


@dataclass(frozen=True, kw_only=True)
class StoreArguments:
    """Look at labels

    status: how far they are written. info: what they are of. verify: whether every record is as its
    checksum says.
    """

    store: str = option(MISSING, "a teacher's labels, or a folder of several teachers'", "FOLDER")


@dataclass(frozen=True, kw_only=True)
class CheckArguments(StoreArguments):
    """Run the teachers again on some images and compare."""

    samples: int = option(256, "how many (view, image) to answer anew", "--samples", at_least=1)
    data_dir: str | None = option(None, "the images; none: where they were", "--data-dir FOLDER")
    teacher_model: str | None = option(None, "the teacher; none: where it was", "--teacher-model")
    device: str = _device()


@dataclass(frozen=True, kw_only=True)
class MergeArguments:
    """Unite labels of one teacher that were written apart."""

    target: str = option(
        MISSING, "the folder to write; it may have parts already", "TARGET", field="output"
    )
    from_: tuple[str, ...] = option(
        MISSING, "labels of one teacher that were written apart", "--from FOLDER"
    )


@dataclass(frozen=True, kw_only=True)
class PruneArguments(StoreArguments):
    """Write a smaller copy: fewer views, fewer classes an image."""

    to: str = option(MISSING, "the folder to write", "--to FOLDER", field="output")
    views: int | None = option(None, "keep the first so many views; none: all", "--views")
    k: int | None = option(None, "classes an image to keep; none: as stored, or 10", "--k")
    encoding: Literal["float16", "topk"] | None = option(
        None, "store logits so instead; none: as they are", "--encoding"
    )
    temperatures: tuple[float, ...] = option(
        (), "of --encoding topk; none: those that are stored, or 1", "--temperatures T"
    )


@dataclass(frozen=True, kw_only=True)
class LabelExportArguments(StoreArguments):
    """Write labels as one Parquet file: sample_id, view, pixels and logits.

    Of topk: class_ids, values (z - max z) and tail_T (the log of the weight of all other classes at
    temperature T) in place of logits.
    """

    to: str = option(MISSING, "the .parquet file to write", "--to FILE")
    views: tuple[int, ...] = option((), "which views; none: all", "--views N")


@dataclass(frozen=True, kw_only=True)
class EvalArguments:
    """accuracy, calibration, agreement with a teacher, FLOPs and speed of models, side by side

    Also k-NN and a linear probe of its features, where it has no classifier too.
    """

    models: tuple[str, ...] = option(
        MISSING,
        "run or export folders, timm names, or hf-hub:ORG/NAME",
        "MODEL ...",
        field="teachers.model.model",
    )
    data_dir: str | None = option(
        None, "images, as for train; none: those the runs were trained on", "--data-dir FOLDER"
    )
    model_path: str | None = _of_teacher("checkpoint", "--model-path FILE")
    pretrained: bool = _of_teacher("pretrained", "--pretrained")
    img_size: int | None = _of_teacher("image_size", "--img-size PIXELS")
    set: tuple[str, ...] = option(
        (),
        "any field of the network, e.g. model.model_args.patch_size=4; of the one it is compared"
        " with: teacher.FIELD=VALUE",
        "--set FIELD=VALUE",
        field="teachers",
    )
    reorder_classes: bool = _of_teacher("reorder_classes", "--reorder-classes")
    knn: int | None = option(
        None,
        "judge its features by the K nearest training images",
        "--knn [K]",
        alone="20",
        at_least=1,
    )
    linear_probe: bool = option(
        False, "judge its features by a linear classifier trained on them", "--linear-probe"
    )
    pool: Literal["mean", "class"] | None = option(
        None,
        "features to judge: the class token, or the mean of the patches (also for none)",
        "--pool",
    )
    teacher_model: str | None = option(
        None, "one to compare its answers with", "--teacher-model", field="teachers.teacher.model"
    )
    teacher_path: str | None = option(
        None, "the teacher's weights", "--teacher-path FILE", field="teachers.teacher.checkpoint"
    )
    teacher_pretrained: bool = option(
        False,
        "timm's weights for it",
        "--teacher-pretrained",
        field="teachers.teacher.pretrained",
    )
    split: Literal["val", "train"] = option("val", "which images", "--split")
    val_split: float | None = option(
        None, "as for train", "--val-split", field="data.val_split", above=0, below=1
    )
    skip_damaged: bool = option(False, "as for train", "--skip-damaged", field="data.skip_damaged")
    batch_size: int = option(
        256,
        "images a step and process",
        "--batch-size -b",
        field="train.eval_batch_size",
        at_least=1,
    )
    workers: int = option(2, "loader processes", "--workers -j", at_least=0)
    amp_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "precision; auto: bfloat16 on a GPU that has it, else float32", "--amp-dtype"
    )
    device: str = _device()
    json: bool = option(False, "print one line of JSON instead of a table", "--json")


@dataclass(frozen=True, kw_only=True)
class ShowArguments:
    """what a run's student and teachers see and say of your own images, as a picture

    A row each: the patches the student leaves a teacher (MaskedKD), what a decoder predicts of
    hidden patches (MAE), where the student attends to; under them the likeliest classes of all.
    """

    run: str = option(MISSING, "a run folder", "RUN")
    images: tuple[str, ...] = option(MISSING, "image files", "IMAGE ...")
    output: str = option("show.png", "the PNG file to write", "--output FILE")
    device: str = _device()


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """a run's student for timm, as ONNX, as torch.export, or on the Hugging Face hub

    timm.create_model('local-dir:FOLDER', pretrained=True) gives the same answers, and an ONNX or
    torch.export file is checked against torch. There is no teacher and no adapter in any. All say
    which networks and licences the weights come from, and claim none.
    """

    model: str = option(MISSING, "a run, or a folder with config.json", "RUN")
    weights: Literal["best", "last"] | None = option(
        None, "which of a run's weights; none: best, or else last", "--weights"
    )
    output: str | None = option(
        None, "folder to write for timm: config.json and model.safetensors", "--output FOLDER"
    )
    card: bool = option(False, "write a model card beside them, README.md", "--card")
    onnx: str | None = option(None, "file to write (extra 'vitdistill[onnx]')", "--onnx FILE")
    pt2: str | None = option(None, "torch.export file to write", "--pt2 FILE")
    push: str | None = option(
        None, "Hugging Face repository to put weights and card into", "--push ORG/NAME"
    )
    private: bool = option(False, "make that repository, if it is new, a private one", "--private")


@dataclass(frozen=True, kw_only=True)
class StudyArguments:
    """several recipes, or settings of one, with several seeds each, and the report on them

    The student without a teacher is among them, and what they share is done once. The same command
    goes on where it was stopped; more rows and seeds may be added. Started several times, once a
    GPU, it does several runs at a time.
    """

    study: str = option(MISSING, "a study's YAML file, or the name of a recipe", "FILE")
    output: str | None = option(None, "folder of it all; none: studies/NAME", "--output FOLDER")
    data_dir: str | None = option(
        None, "the images, of all rows", "--data-dir FOLDER", field="data.dir"
    )
    set: tuple[str, ...] = option((), "any field of a recipe, in all rows", "--set FIELD=VALUE")
    seeds: tuple[int, ...] = option(
        (), "seeds of every row; none: those of the file, or 0 1 2", "--seeds N"
    )
    dry_run: bool = option(
        False, "only print what every row will cost, and how long by measured steps", "--dry-run"
    )
    device: str = _device()


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """whether it helped and what it cost: a page on finished runs, with tables, charts, pictures

    From runs of the same student, with and without a teacher and with several seeds, it says which
    is better, which is not, and what so few runs cannot tell. The HTML file needs nothing else.
    """

    paths: tuple[str, ...] = option(
        MISSING, "run folders, or folders with runs in them", "PATH ..."
    )
    output: str = option("report.html", "the file to write", "--output FILE")
    format: Literal["html", "md"] | None = option(
        None, "none: md for a FILE that ends so, else html", "--format"
    )
    ask: bool = option(
        False,
        "first run students and teachers on the validation images and keep their answers in each"
        " run's folder: adds agreement, confused classes, sharper verdicts",
        "--ask",
    )
    device: str | None = option(None, "for --ask: auto, cpu, cuda or cuda:N", "--device")


@dataclass(frozen=True, kw_only=True)
class DemoArguments:
    """the whole job in two minutes on a laptop: teacher, student, report

    On scikit-learn's 1,797 handwritten digits: train a ViT teacher on the spot, then a small ViT
    alone, by plain distillation, and by MaskedKD.
    """

    output: str = option(
        "runs/demo", "folder for it all; finished runs are not repeated", "--output FOLDER"
    )


def recipe_flags() -> dict[str, Flag]:
    """Return the flags that change a recipe, by its field."""
    return {path: Flag(path, kind, described) for path, kind, described in settings_with_flags()}


def groups_of(arguments: type) -> Groups:
    """Return the flags of a command under the headings of its help."""
    own = [*flags_of(arguments)]
    groups: dict[str, list[Flag]] = {"arguments": [flag for flag in own if flag.positional]}
    if issubclass(arguments, RecipeArguments):
        for path, flag in recipe_flags().items():
            groups.setdefault(path.partition(".")[0], []).append(flag)
    return {**groups, "flags": [flag for flag in own if not flag.positional]}
