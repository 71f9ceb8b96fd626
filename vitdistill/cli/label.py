"""``vitdistill label``: write a recipe's labels, and look after label stores."""

import shlex
from pathlib import Path

from rich.console import Console

from ..errors import ConfigError, DataError, UserError
from ..labels.encoding import LogitEncoding
from ..labels.layout import Layout
from ..labels.parquet import export_labels
from ..labels.store import LabelStore, Status
from ..labels.tools import merge, prune
from ..messages import format_bytes, plural
from ..recipes.stages import Stages
from ..runs.display import Display
from ..runs.label import label
from ..runs.label_check import check as check_labels
from ..runs.stored import describe_proof, proof_of
from ..storage.manifest import MANIFEST
from .arguments import (
    CheckArguments,
    LabelArguments,
    LabelExportArguments,
    MergeArguments,
    PruneArguments,
    StoreArguments,
)
from .console import say
from .recipe import resolve_recipe
from .render import teller


def write(args: LabelArguments) -> int:
    recipe = resolve_recipe(args)
    if isinstance(recipe, Stages):
        what = f"the recipe {recipe.name!r} has stages"
        raise UserError(what, "give the recipe of one stage, recipe.yaml in its folder")
    for name, teacher in recipe.teachers.items():
        if teacher.labels is not None:
            what = f"--labels cannot take effect (teachers.{name}.labels)"
            raise UserError(what, "leave it out: labels are written, into --output")
    output = Path(args.output or Path("labels") / recipe.name)
    done = label(recipe, output, args, device=args.device, say=teller(args))
    for name, store in done.stores.items():
        status = store.status()
        say(f"{name}: {status.records:,} records, {format_bytes(status.bytes)} in {store.path}")
    views = f" --views {args.settings['data.views']}" if "data.views" in args.settings else ""
    say(f"done: train with the same recipe and --labels {shlex.quote(str(output))}{views}")
    return 0


# --- looking after -------------------------------------------------------------------------------


def open_all(folder: str) -> dict[str, LabelStore]:
    """Return every store in a folder by its name, or the one that the folder itself is."""
    inside = [path.parent for path in sorted(Path(folder).glob(f"*/{MANIFEST}"))]
    alone = (Path(folder) / MANIFEST).exists() or not inside
    return {path.name: LabelStore.open(path) for path in ([Path(folder)] if alone else inside)}


def status(args: StoreArguments) -> int:
    for name, store in open_all(args.store).items():
        status = store.status()
        share = 100 * status.sealed // status.parts
        state = "complete" if status.sealed == status.parts else f"{share} %"
        say(f"{name}: {state}, {_amount(status)}")
    return 0


def info(args: StoreArguments) -> int:
    for name, store in open_all(args.store).items():
        manifest, layout = store.manifest, store.layout
        network = manifest.about.get("network", {}).get("architecture", "a teacher")
        size = format_bytes(layout.record_bytes)
        say(f"{name}: {network}, {layout.describe()}, {size} a record")
        views = f"{manifest.num_samples:,} images x {plural(manifest.num_views, 'view')}"
        say(f"  {views}, parts of {manifest.part_size:,}")
        if proof := proof_of(store):
            say(f"  {describe_proof(proof)}")
        versions = manifest.about.get("versions", {}).items()
        made = {f"made with {library}": version for library, version in versions}
        made |= {"made by": manifest.about.get("command", "")}
        for key, value in {**manifest.identity, **made}.items():
            say(f"  {key:<32}{', '.join(map(str, value)) if isinstance(value, list) else value}")
    return 0


def verify(args: StoreArguments) -> int:
    bad = 0
    for name, store in open_all(args.store).items():
        found, status = store.verify(), store.status()
        parts = f"{status.sealed} of {status.parts} parts are there"
        say(f"{name}: {parts}, damaged or foreign: {plural(len(found), 'file')}")
        for sentence in found:
            say(f"  {sentence}")
        bad += len(found)
    if bad:
        what = f"in {args.store}, damaged or foreign: {plural(bad, 'file')}"
        raise DataError(what, "delete what is named above and run vitdistill label again")
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
            say=teller(args),
        )
        say(f"{name}: {found}", fold=True)
        wrong += not found.as_stored
    if wrong:
        what = f"the teacher does not answer as {args.store} says"
        raise DataError(what, "it, the images or a library has changed, so label again")
    return 0


def merge_stores(args: MergeArguments) -> int:
    with Display(Console()) as display:
        store = merge(args.from_, args.target, say=display.working)
    say(f"{args.target}: {_amount(store.status())}")
    return 0


def _amount(status: Status) -> str:
    parts = f"{status.sealed} of {status.parts} parts"
    return f"{parts}, {status.records:,} records, {format_bytes(status.bytes)}"


def prune_store(args: PruneArguments) -> int:
    source = LabelStore.open(args.store)
    encoding = _encoding(source.layout, args.encoding, args.k, args.temperatures)
    with Display(Console()) as display:
        say_part = display.working
        store = prune(args.store, args.to, num_views=args.views, encoding=encoding, say=say_part)
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
