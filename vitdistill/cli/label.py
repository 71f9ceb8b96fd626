"""``vitdistill label``: write a recipe's labels, and look after label stores."""

from pathlib import Path

from ..errors import ConfigError, DataError, UserError
from ..labels.encoding import LogitEncoding
from ..labels.layout import Layout
from ..labels.parquet import export_labels
from ..labels.store import LabelStore, Status
from ..labels.tools import merge, prune
from ..messages import format_bytes, plural
from ..recipes.stages import Stages
from ..runs.label import LabelOptions, label
from ..runs.label_check import check as check_labels
from .arguments import (
    CheckArguments,
    LabelArguments,
    LabelExportArguments,
    MergeArguments,
    PruneArguments,
    StoreArguments,
)
from .recipe import resolve_recipe
from .say import now_and_then, say


def write(args: LabelArguments) -> int:
    """Write the labels of a recipe's teachers."""
    recipe = resolve_recipe(args)
    if isinstance(recipe, Stages):
        raise UserError(
            f"the recipe {recipe.name!r} has stages",
            "label the recipe of one of them, its recipe.yaml in the run's folder",
        )
    for name, teacher in recipe.teachers.items():
        if teacher.labels is not None:
            what = f"--labels cannot take effect (teachers.{name}.labels)"
            raise UserError(what, "labels are written here, into --output")
    output = Path(args.output or Path("labels") / recipe.name)
    options = LabelOptions(
        encoding=args.encoding,
        k=args.k,
        temperatures=args.temperatures,
        hidden_dtype=args.hidden_dtype,
        part_size=args.part_size,
    )
    done = label(recipe, output, options, device=args.device, say=say)
    for name, store in done.stores.items():
        status = store.status()
        say(f"{name}: {status.records:,} records, {format_bytes(status.bytes)} in {store.path}")
    say(f"done: train with the same recipe and --labels {output}")
    return 0


# --- looking after -------------------------------------------------------------------------------


def open_all(folder: str) -> dict[str, LabelStore]:
    """Return every store in a folder by its name, or the one that the folder itself is."""
    path = Path(folder)
    if (path / "manifest.json").exists() or not path.is_dir():
        return {path.name: LabelStore.open(path)}
    inside = sorted(child for child in path.iterdir() if (child / "manifest.json").exists())
    return {child.name: LabelStore.open(child) for child in inside or [path]}


def status(args: StoreArguments) -> int:
    for name, store in open_all(args.store).items():
        status = store.status()
        done = status.sealed == status.parts
        state = "complete" if done else f"{100 * status.sealed // status.parts} %"
        say(f"{name}: {state}, {_amount(status)}")
        for view, part in status.writing:
            say(f"  part {part} of view {view} is being written")
    return 0


def info(args: StoreArguments) -> int:
    for name, store in open_all(args.store).items():
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


def verify(args: StoreArguments) -> int:
    bad = []
    for name, store in open_all(args.store).items():
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
            f"{plural(len(bad), 'file')} of {args.store} {was} written: delete {them} and run"
            " vitdistill label again"
        )
    return 0


def check(args: CheckArguments) -> int:
    wrong = 0
    for name, store in open_all(args.store).items():
        found = check_labels(
            store,
            args.samples,
            data_dir=args.data_dir,
            model=args.teacher_model,
            device=args.device,
            say=say,
        )
        say(f"{name}: {found}")
        wrong += not found.as_stored
    if wrong:
        raise DataError(
            f"the teacher does not answer as {args.store} says: it, the images or a library has"
            " changed; label again"
        )
    return 0


def merge_stores(args: MergeArguments) -> int:
    store = merge(args.from_, args.target, say=now_and_then())
    say(f"{args.target}: {_amount(store.status())}")
    return 0


def _amount(status: Status) -> str:
    parts = f"{status.sealed} of {status.parts} parts"
    return f"{parts}, {status.records:,} records, {format_bytes(status.bytes)}"


def prune_store(args: PruneArguments) -> int:
    source, tell = LabelStore.open(args.store), now_and_then()
    encoding = _encoding(source.layout, args.encoding, args.k, args.temperatures)
    store = prune(args.store, args.to, num_views=args.views, encoding=encoding, say=tell)
    after, before = store.status(), format_bytes(source.status().bytes)
    say(f"{args.to}: {after.records:,} records, {format_bytes(after.bytes)} (from {before})")
    return 0


def _encoding(
    layout: Layout, kind: str | None, k: int | None, temperatures: tuple[float, ...]
) -> LogitEncoding | None:
    """Return the encoding that the flags ask for; what they leave out is as stored."""
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


def export(args: LabelExportArguments) -> int:
    store = LabelStore.open(args.store)
    rows, size = export_labels(store, args.to, [*args.views] or None)
    if store.layout.hidden or store.layout.features is not None:
        say("hidden states and features are left out: only logits are exported")
    say(f"{args.to}: {rows:,} rows, {format_bytes(size)}")
    return 0
