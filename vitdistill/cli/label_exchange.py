"""``vitdistill label import`` and ``vitdistill label export``: labels of other tools, and for
them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import Positional

from ..errors import UserError
from ..labels.store import LabelStore
from ..messages import format_bytes
from .flags import TEXT, about, asks_help, parse_flags, read_value, wrap
from .label import WritingFlags, parse_writing, say


@dataclass
class ImportFlags(WritingFlags):
    """Flags of ``label import FILE RECIPE``."""

    teacher_: Annotated[
        str | None,
        TEXT,
        about(
            "which of the recipe's teachers answered; none: its only one",
            name="teacher",
            metavar="NAME",
        ),
    ] = None
    classes: Annotated[
        str | None,
        TEXT,
        about(
            "names of the classes in the order of the logits, one a line; none: as FILE says",
            metavar="FILE",
        ),
    ] = None


@dataclass
class ExportFlags:
    """Flags of ``label export``."""

    store: Positional[Annotated[str, TEXT, about("a teacher's labels", metavar="FOLDER")]] = field(
        metadata={"positional": "FOLDER"}
    )
    to: Annotated[
        str | None, TEXT, about("the file to write, .npz or .parquet", metavar="FILE")
    ] = None
    views: Annotated[tuple[str, ...], about("which views; none: all", metavar="N ...")] = ()


def import_main(words: Sequence[str]) -> int:
    """Make labels of answers in a file."""
    about_it = (
        "Make labels of answers that were made elsewhere. FILE is .npz or .parquet with the columns"
        " sample_id (the number of the training image from 0, or its key, such as cat/001.png),"
        " view (from 0; none: 0) and logits, for every training image in every view. The recipe"
        " makes the views: it has to be the one that the student is trained with."
    )
    file = ""
    if not asks_help(words):
        if not words or words[0].startswith("-"):
            raise UserError(
                "FILE is missing, or not the first word: vitdistill label import FILE RECIPE"
                " [flags]"
            )
        file, words = words[0], words[1:]
    flags, recipe, output = parse_writing("label import FILE", ImportFlags, words, wrap(about_it))
    from ..runs.label_import import import_labels

    store = import_labels(
        file,
        recipe,
        output,
        flags.options(),
        teacher=flags.teacher_,
        classes=flags.classes,
        device=flags.device,
        say=say,
    )
    status = store.status()
    say(
        f"{store.path.name}: {status.records:,} records, {format_bytes(status.bytes)} in"
        f" {store.path}"
    )
    without = ", without a teacher's model" if recipe.teachers[store.path.name].model else ""
    say(f"done: train with the same recipe{without} and --labels {output}")
    return 0


def export_main(words: Sequence[str]) -> int:
    """Write the logits of labels into one file."""
    about_it = (
        "Write labels as one file: sample_id, view, pixels and logits; of labels that are not"
        " complete class_ids in place of logits, and of topk also values (z - max z) and tail_T"
        " (the log of the weight of all other classes at temperature T)."
    )
    flags = parse_flags(ExportFlags, words, "vitdistill label export", wrap(about_it))
    if flags.to is None:
        raise UserError("--to is missing: name the file to write, .npz or .parquet")
    from ..labels.exchange import export_labels

    store = LabelStore.open(flags.store)
    views = [read_value(word, int, "--views", optional=False) for word in flags.views]
    rows, size = export_labels(store, flags.to, views or None)
    if store.layout.hidden or store.layout.features is not None:
        say("hidden states and features are left out: only logits are exported")
    say(f"{flags.to}: {rows:,} rows, {format_bytes(size)}")
    return 0
