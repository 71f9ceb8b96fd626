"""``vitdistill label import`` and ``vitdistill label export``: labels of other tools, and for them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional

from ..durable import bytes_shown
from ..errors import UserError
from ..labels.store import LabelStore
from ..stages import Stages
from .flags import COUNT, TEXT, about, asks_help, one_of, parse_flags, read_value, wrap
from .label import refuse_labels
from .recipe_flags import RecipeFlags, parse


@dataclass
class ImportFlags(RecipeFlags):
    """Flags of ``label import FILE RECIPE``."""

    output: Annotated[
        str | None, TEXT, about("the folder; the labels go into a folder of the teacher's name there; none: labels/RECIPE")
    ] = None
    teacher_: Annotated[
        str | None, TEXT, about("which of the recipe's teachers answered; none: its only one", name="teacher", metavar="NAME")
    ] = None
    classes: Annotated[
        str | None, TEXT, about("names of the classes in the order of the logits, one a line; none: as FILE says", metavar="FILE")
    ] = None
    encoding: Annotated[
        str,
        one_of("auto", "float32", "float16", "uint8", "topk", "sampled"),
        about("of the logits; auto: float16 up to 256 classes, else the k largest and the mass of the others (topk)"),
    ] = "auto"
    k: Annotated[int | None, COUNT, about("classes an image of topk, draws of sampled; none: 10")] = None
    temperatures: Annotated[
        tuple[str, ...], about("at which topk and sampled are right; none: those of the recipe's objectives", metavar="T ...")
    ] = ()
    part_size: Annotated[int, COUNT, about("images a part: what is written at a time, and a crash can cost")] = 16384
    device: Annotated[str, TEXT, about("where the views are made: auto, cpu, cuda or cuda:N")] = "auto"


@dataclass
class ExportFlags:
    """Flags of ``label export``."""

    store: Positional[Annotated[str, TEXT, about("a teacher's labels", metavar="FOLDER")]] = field(metadata={"positional": "FOLDER"})
    to: Annotated[str | None, TEXT, about("the file to write, .npz or .parquet", metavar="FILE")] = None
    views: Annotated[tuple[str, ...], about("which views; none: all", metavar="N ...")] = ()


def _say(text: str) -> None:
    Console().print(text, highlight=False, markup=False, soft_wrap=True)


def import_main(words: Sequence[str]) -> int:
    """Make labels of answers in a file."""
    about_it = (
        "Make labels of answers that were made elsewhere. FILE is .npz or .parquet with the columns sample_id (the number of the training "
        "image from 0, or its key, such as cat/001.png), view (from 0; none: 0) and logits, for every training image in every view. The "
        "recipe makes the views: it has to be the one that the student is trained with."
    )
    file = ""
    if not asks_help(words):
        if not words or words[0].startswith("-"):
            raise UserError("FILE is missing, or not the first word: vitdistill label import FILE RECIPE [flags]")
        file, words = words[0], words[1:]
    flags, recipe = parse("label import FILE", ImportFlags, words, wrap(about_it))
    if isinstance(recipe, Stages):
        raise UserError(f"the recipe {recipe.name!r} has stages: label the recipe of one of them (its recipe.yaml in the run's folder)")
    refuse_labels(recipe)
    output = Path(flags.output) if flags.output is not None else Path("labels") / recipe.name
    from ..labelling import LabelOptions
    from ..labelling_import import import_labels

    options = LabelOptions(
        encoding=flags.encoding,  # type: ignore[arg-type]
        k=flags.k,
        temperatures=tuple(read_value(word, float, "--temperatures", optional=False) for word in flags.temperatures),
        part_size=flags.part_size,
    )
    store = import_labels(file, recipe, output, options, teacher=flags.teacher_, classes=flags.classes, device=flags.device, say=_say)
    status = store.status()
    _say(f"{store.path.name}: {status.records:,} records, {bytes_shown(status.bytes)} in {store.path}")
    without = ", without a teacher's model" if recipe.teachers[store.path.name].model else ""
    _say(f"done: train with the same recipe{without} and --labels {output}")
    return 0


def export_main(words: Sequence[str]) -> int:
    """Write the logits of labels into one file."""
    about_it = (
        "Write labels as one file: sample_id, view, pixels and logits; of labels that are not complete class_ids in place of logits, and "
        "of topk also values (z - max z) and tail_T (the log of the weight of all other classes at temperature T)."
    )
    flags = parse_flags(ExportFlags, words, "vitdistill label export", wrap(about_it))
    if flags.to is None:
        raise UserError("--to is missing: name the file to write, .npz or .parquet")
    from ..labels.exchange import export_labels

    store = LabelStore.open(flags.store)
    views = [read_value(word, int, "--views", optional=False) for word in flags.views]
    rows, size = export_labels(store, flags.to, views or None)
    if store.layout.hidden or store.layout.features is not None:
        _say("hidden states and features are left out: only logits are exported")
    _say(f"{flags.to}: {rows:,} rows, {bytes_shown(size)}")
    return 0
