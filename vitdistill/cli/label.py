"""``vitdistill label``: write a recipe's labels, and look after label stores."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from rich.console import Console
from tyro.conf import Positional

from ..errors import ConfigError, DataError, UserError
from ..labels.encoding import LogitEncoding
from ..labels.layout import Layout
from ..labels.parquet import export_labels
from ..labels.store import LabelStore
from ..labels.tools import merge, prune
from ..messages import format_bytes, plural
from ..recipes.config import Recipe
from ..recipes.stages import Stages
from .flags import COUNT, TEXT, about, one_of, parse_flags, read_value, wrap
from .recipe_flags import RecipeFlags, parse

if TYPE_CHECKING:
    from ..runs.label import LabelOptions

ENCODINGS = ("auto", "float32", "float16", "topk")


@dataclass
class WritingFlags(RecipeFlags):
    """Flags of everything that writes labels for a recipe."""

    output: Annotated[
        str | None,
        TEXT,
        about("the folder; a teacher's labels go into one of its name there; none: labels/RECIPE"),
    ] = None
    encoding: Annotated[
        str,
        one_of(*ENCODINGS),
        about(
            "of the logits; auto: float16 up to 256 classes, else the k largest and the mass of the"
            " others (topk)"
        ),
    ] = "auto"
    k: Annotated[int | None, COUNT, about("classes an image that topk keeps; none: 10")] = None
    temperatures: Annotated[
        tuple[str, ...],
        about(
            "at which topk is right; none: those of the recipe's objectives",
            metavar="T ...",
        ),
    ] = ()
    part_size: Annotated[
        int, COUNT, about("images a part: what one process writes at a time, and a crash can cost")
    ] = 16384
    device: Annotated[str, TEXT, about("auto, cpu, cuda or cuda:N")] = "auto"

    def options(self, hidden_dtype: str | None = None) -> "LabelOptions":
        """How answers are stored; raises `ConfigError` for flags that do not fit together."""
        from ..runs.label import LabelOptions

        return LabelOptions(
            encoding=self.encoding,  # type: ignore[arg-type]
            k=self.k,
            temperatures=read_temperatures(self.temperatures),
            hidden_dtype=hidden_dtype,  # type: ignore[arg-type]
            part_size=self.part_size,
        )


@dataclass
class LabelFlags(WritingFlags):
    """Flags of ``label RECIPE``."""

    hidden_dtype: Annotated[
        str | None,
        one_of("float16", "float32"),
        about("of hidden states the recipe reads; none: float16"),
    ] = None


@dataclass
class _StoreFlags:
    store: Positional[
        Annotated[
            str,
            TEXT,
            about("a teacher's labels, or a folder of several teachers'", metavar="FOLDER"),
        ]
    ] = field(metadata={"positional": "FOLDER"})


@dataclass
class _CheckFlags(_StoreFlags):
    samples: Annotated[int, COUNT, about("how many (view, image) to answer anew")] = 256
    data_dir: Annotated[
        str | None, TEXT, about("where the images are now; none: where they were")
    ] = None
    teacher_model: Annotated[str | None, TEXT, about("the teacher; none: where it was")] = None
    device: Annotated[str, TEXT, about("auto, cpu, cuda or cuda:N")] = "auto"


@dataclass
class _MergeFlags:
    target: Positional[
        Annotated[
            str, TEXT, about("the folder to write; it may have parts already", metavar="TARGET")
        ]
    ] = field(metadata={"positional": "TARGET"})
    from_: Annotated[
        tuple[str, ...],
        about(
            "labels of one teacher, as they were written apart", name="from", metavar="FOLDER ..."
        ),
    ] = ()


@dataclass
class _PruneFlags(_StoreFlags):
    to: Annotated[str | None, TEXT, about("the folder to write")] = None
    views: Annotated[int | None, COUNT, about("keep the first so many views; none: all")] = None
    k: Annotated[
        int | None,
        COUNT,
        about("largest classes of an image to keep; none: all that are stored, or 10"),
    ] = None
    encoding: Annotated[
        str | None,
        one_of("float16", "topk"),
        about("store logits so instead; none: as they are"),
    ] = None
    temperatures: Annotated[
        tuple[str, ...],
        about("of --encoding topk; none: those that are stored, or 1", metavar="T ..."),
    ] = ()


@dataclass
class _ExportFlags:
    store: Positional[Annotated[str, TEXT, about("a teacher's labels", metavar="FOLDER")]] = field(
        metadata={"positional": "FOLDER"}
    )
    to: Annotated[str | None, TEXT, about("the .parquet file to write", metavar="FILE")] = None
    views: Annotated[tuple[str, ...], about("which views; none: all", metavar="N ...")] = ()


def main(words: Sequence[str]) -> int:
    """Write labels, or do what the first word says with a store."""
    verbs: dict[str, Callable[[Sequence[str]], int]] = {
        "status": _status,
        "info": _info,
        "verify": _verify,
        "check": _check,
        "merge": _merge,
        "prune": _prune,
        "export": _export,
    }
    if words and words[0] in verbs:
        return verbs[words[0]](words[1:])
    if len(words) > 1 and not words[1].startswith("-"):  # two words: no recipe and its flags
        close = get_close_matches(words[0], verbs, n=1)
        hint = (
            f"did you mean {close[0]!r}?"
            if close
            else f"choose from {', '.join(verbs)}, or give a recipe and flags"
        )
        raise UserError(f"there is no 'vitdistill label {words[0]}': {hint}")
    return _write(words)


def say(text: str) -> None:
    Console().print(text, highlight=False, markup=False, soft_wrap=True)


EVERY_S = 10.0
"""Seconds between the lines about long work."""


def now_and_then() -> Callable[[str], None]:
    """`say` for every part of a long work: what it is told is printed when nothing was for
    `EVERY_S` seconds.
    """
    told = time.monotonic()

    def tell(text: str) -> None:
        nonlocal told
        if time.monotonic() - told >= EVERY_S:
            told = time.monotonic()
            say(text)

    return tell


# --- writing -------------------------------------------------------------------------------------


def _write(words: Sequence[str]) -> int:
    about_it = (
        "Run a recipe's teachers once, over the very views its student will see, and store what"
        " they say. Training with --labels then needs no teacher. The same command goes on where it"
        " was stopped, in any number of processes at once.\nOf labels that are there: vitdistill"
        " label status | info | verify | check | merge | prune | export"
    )
    flags, recipe, output = parse_writing("label", LabelFlags, words, wrap(about_it))
    from ..runs.label import label

    done = label(recipe, output, flags.options(flags.hidden_dtype), device=flags.device, say=say)
    for name, store in done.stores.items():
        status = store.status()
        say(f"{name}: {status.records:,} records, {format_bytes(status.bytes)} in {store.path}")
    say(f"done: train with the same recipe and --labels {output}")
    return 0


Flags = TypeVar("Flags", bound=WritingFlags)


def parse_writing(
    command: str, flags: type[Flags], words: Sequence[str], about_it: str
) -> tuple[Flags, Recipe, Path]:
    """Flags and the recipe to label for, and the folder to write into; `UserError` for a recipe of
    stages, or one that reads labels.
    """
    found, recipe = parse(command, flags, words, about_it)
    if isinstance(recipe, Stages):
        raise UserError(
            f"the recipe {recipe.name!r} has stages: label the recipe of one of them (its"
            " recipe.yaml in the run's folder)"
        )
    for name, teacher in recipe.teachers.items():
        if teacher.labels is not None:
            raise UserError(
                f"--labels cannot take effect (teachers.{name}.labels): labels are written here,"
                " into --output"
            )
    return (
        found,
        recipe,
        Path(found.output) if found.output is not None else Path("labels") / recipe.name,
    )


def read_temperatures(words: Sequence[str]) -> tuple[float, ...]:
    return tuple(read_value(word, float, "--temperatures", optional=False) for word in words)


# --- looking after -------------------------------------------------------------------------------


def open_all(folder: str) -> dict[str, LabelStore]:
    """Every store in a folder by its name, or the one that the folder itself is."""
    path = Path(folder)
    if (path / "manifest.json").exists() or not path.is_dir():
        return {path.name: LabelStore.open(path)}
    inside = sorted(child for child in path.iterdir() if (child / "manifest.json").exists())
    return {child.name: LabelStore.open(child) for child in inside} or {
        path.name: LabelStore.open(path)
    }


def _status(words: Sequence[str]) -> int:
    flags = parse_flags(
        _StoreFlags,
        words,
        "vitdistill label status",
        wrap("How far labels are written, and by whom."),
    )
    for name, store in open_all(flags.store).items():
        status = store.status()
        state = (
            "complete"
            if status.sealed == status.parts
            else f"{100 * status.sealed // status.parts} %"
        )
        say(
            f"{name}: {state}, {status.sealed} of {status.parts} parts, {status.records:,} records,"
            f" {format_bytes(status.bytes)}"
        )
        for view, part in status.writing:
            say(f"  part {part} of view {view} is being written")
    return 0


def _info(words: Sequence[str]) -> int:
    flags = parse_flags(_StoreFlags, words, "vitdistill label info", wrap("What labels are of."))
    for name, store in open_all(flags.store).items():
        manifest = store.manifest
        say(
            f"{name}: {manifest.about['network']['architecture']}, {store.layout.describe()},"
            f" {store.layout.record_bytes} bytes a record"
        )
        say(
            f"  {manifest.num_samples:,} images x {manifest.num_views} views, parts of"
            f" {manifest.part_size:,}"
        )
        for key, value in manifest.identity.items():
            say(f"  {key:<32}{_plain(value)}")
        for library, version in manifest.about.get("versions", {}).items():
            say(f"  made with {library:<22}{version}")
        if manifest.about.get("command"):
            say(f"  made by   {manifest.about['command']}")
    return 0


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _verify(words: Sequence[str]) -> int:
    flags = parse_flags(
        _StoreFlags,
        words,
        "vitdistill label verify",
        wrap("Read every record and compare it with its checksum."),
    )
    bad = []
    for name, store in open_all(flags.store).items():
        found = store.verify()
        status = store.status()
        are = "is" if len(found) == 1 else "are"
        say(
            f"{name}: {status.sealed} of {status.parts} parts are there,"
            f" {plural(len(found), 'file')} {are} damaged or foreign"
        )
        for sentence in found:
            say(f"  {sentence}")
        bad += found
    if bad:
        was, them = (
            ("is not as it was", "it") if len(bad) == 1 else ("are not as they were", "them")
        )
        raise DataError(
            f"{plural(len(bad), 'file')} of {flags.store} {was} written: delete {them} and run"
            " vitdistill label again"
        )
    return 0


def _check(words: Sequence[str]) -> int:
    flags = parse_flags(
        _CheckFlags,
        words,
        "vitdistill label check",
        wrap("Run the teachers again on some images and compare."),
    )
    if flags.samples < 1:
        raise UserError(f"--samples is {flags.samples}: give at least 1")
    from ..runs.label_check import check

    wrong = 0
    for name, store in open_all(flags.store).items():
        found = check(
            store,
            flags.samples,
            data_dir=flags.data_dir,
            model=flags.teacher_model,
            device=flags.device,
            say=say,
        )
        say(f"{name}: {found}")
        wrong += not found.as_stored
    if wrong:
        raise DataError(
            f"the teacher does not answer as {flags.store} says: it, the images or a library has"
            " changed; label again"
        )
    return 0


def _merge(words: Sequence[str]) -> int:
    flags = parse_flags(
        _MergeFlags,
        words,
        "vitdistill label merge",
        wrap("Unite labels of one teacher that were written apart."),
    )
    if not flags.from_:
        raise UserError("--from is missing: name the labels to unite")
    store = merge(flags.from_, flags.target, say=now_and_then())
    status = store.status()
    say(
        f"{flags.target}: {status.sealed} of {status.parts} parts, {status.records:,} records,"
        f" {format_bytes(status.bytes)}"
    )
    return 0


def _prune(words: Sequence[str]) -> int:
    flags = parse_flags(
        _PruneFlags,
        words,
        "vitdistill label prune",
        wrap("Write a smaller copy: fewer views, fewer classes an image."),
    )
    if flags.to is None:
        raise UserError("--to is missing: name the folder to write")
    source = LabelStore.open(flags.store)
    encoding = _encoding(
        source.layout, flags.encoding, flags.k, read_temperatures(flags.temperatures)
    )
    store = prune(
        flags.store, flags.to, num_views=flags.views, encoding=encoding, say=now_and_then()
    )
    before, after = source.status(), store.status()
    say(
        f"{flags.to}: {after.records:,} records, {format_bytes(after.bytes)} (from"
        f" {format_bytes(before.bytes)})"
    )
    return 0


def _encoding(
    layout: Layout, kind: str | None, k: int | None, temperatures: tuple[float, ...]
) -> LogitEncoding | None:
    """The encoding that the flags ask for; what they leave out is as stored."""
    if kind is None and k is None and not temperatures:
        return None
    stored = layout.logits
    if stored is None:
        raise ConfigError("these labels hold no logits to make smaller", field="encoding")
    kind = kind or stored.kind
    if kind == "topk":
        k = (stored.k or 10) if k is None else k
        temperatures = temperatures or stored.temperatures or (1.0,)
    return LogitEncoding(
        kind=kind,  # type: ignore[arg-type]
        num_classes=stored.num_classes,
        k=k or 0,
        temperatures=temperatures,
    )


def _export(words: Sequence[str]) -> int:
    about_it = (
        "Write labels as one Parquet file: sample_id, view, pixels and logits; of topk class_ids,"
        " values (z - max z) and tail_T (the log of the weight of all other classes at temperature"
        " T) in place of logits."
    )
    flags = parse_flags(_ExportFlags, words, "vitdistill label export", wrap(about_it))
    if flags.to is None:
        raise UserError("--to is missing: name the .parquet file to write")
    store = LabelStore.open(flags.store)
    views = [read_value(word, int, "--views", optional=False) for word in flags.views]
    rows, size = export_labels(store, flags.to, views or None)
    if store.layout.hidden or store.layout.features is not None:
        say("hidden states and features are left out: only logits are exported")
    say(f"{flags.to}: {rows:,} rows, {format_bytes(size)}")
    return 0
