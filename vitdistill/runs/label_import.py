"""Labels made elsewhere become a label store, beside the checksums of the views they are said to be
of.
"""

import hashlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .. import keyed
from ..data.augment import evaluated_as_trained
from ..data.loader import TrainLoader
from ..data.source import ImageSource
from ..distill.classes import match_classes
from ..distill.plan import make_plan
from ..distill.teacher import setting
from ..errors import ConfigError, DataError, NonFiniteError, Preempted
from ..labels.encoding import Layout
from ..labels.exchange import AnswerFile, Rows, free_memory, open_answers, read_class_names
from ..labels.identity import network_to_json, teacher_identity, versions
from ..labels.store import LabelStore, Manifest
from ..messages import format_bytes, printable
from ..recipes.config import Recipe
from ..storage.atomic import require_free, sha256_file
from ..storage.manifest import MANIFEST
from ..vit.network import Network
from ..world import choose_device
from .label import LabelOptions, describe, logit_encoding
from .networks import Built, build_student, reads_logits, trains_classifier
from .preflight import NUM_IMAGES, judge
from .prepare import identity_of_views, open_data
from .train import StopRequest

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]


def import_labels(
    file: str | Path,
    recipe: Recipe,
    output: str | Path,
    options: LabelOptions,
    *,
    teacher: str | None = None,
    classes: str | Path | None = None,
    device: str = "auto",
    memory: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> LabelStore:
    """Write the answers in an NPZ or Parquet file into ``output/TEACHER``, as `label` would have,
    or go on with what is there.

    The recipe says which views they are of (seed, augmentation, the student's input). These are
    made for their checksums; no teacher is needed. The whole file is read and checked before
    anything is written.

    Args:
        file: see `vitdistill.labels.exchange` for its columns.
        teacher: whose answers they are; None: the recipe's only one.
        classes: a file with the names of the classes in the order of the logits, one a line; None:
            as the answers say.
        device: where the views are made.
        memory: bytes that are free; None: as the system says.

    Raises:
        UserError: one sentence, before anything is written for everything that can be known before.
        Preempted: it was asked to stop; what is written stays, and the same command goes on.
    """
    name = _teacher_of(recipe, teacher)
    if options.hidden_dtype is not None:
        raise ConfigError("hidden_dtype cannot take effect: only logits are imported")
    if recipe.data.augment.repeated_aug > 1:
        raise ConfigError(
            "labels are of one view an image and epoch, and repeated_aug shows several of some: set"
            " --repeated-aug 1"
        )
    train, val = open_data(recipe)
    answers = open_answers(file, memory)
    labelled = val is not None or any(
        objective.reads_labels for objective in recipe.objectives.values()
    )
    folders = train.classes if labelled else ()
    names = _names(answers, classes)
    chosen = _choose(recipe, name, answers, names, folders, say)
    student = _student(recipe, len(chosen.classes) or answers.num_classes)
    count = answers.num_classes if chosen.index is None else len(chosen.index)
    network = Network(
        name,
        "imported",
        student.spec.image_size,
        depth=0,
        dim=0,
        num_classes=count,
        num_parameters=0,
    )
    if not reads_logits(recipe.objectives, network):
        raise ConfigError(
            f"no objective of the recipe reads logits of the {name}, and nothing else can be"
            " imported: add one (--with kd)"
        )
    layout = Layout(logits=logit_encoding(recipe, network, options))
    if (
        len(recipe.teachers) == 1
    ):  # what training would refuse; of other teachers only training knows
        make_plan(
            student.network,
            {name: network},
            recipe.objectives,
            recipe.selector,
            recipe.masking,
            {name: layout},
        )
    loader = TrainLoader(
        train,
        recipe.data.augment,
        student.spec,
        batch_size=2,
        seed=recipe.data_seed,
        in_memory=recipe.data.in_memory,
        views=recipe.data.views,
        workers=recipe.data.workers,
        device=choose_device(device),
    )
    work = _Import(
        recipe,
        answers,
        chosen.index,
        loader,
        layout,
        options.part_size,
        free_memory() if memory is None else memory,
    )
    work.scan()
    if chosen.classes and train.classes == chosen.classes:
        work.prove(name, say)
    work.check_first_pixels()
    answered = chosen.classes if trains_classifier(recipe.objectives, student.network) else ()
    identity = identity_of_views(train, answered, student.spec, recipe, loader)
    digest = sha256_file(answers.path)
    identity |= teacher_identity(digest, student.spec, answers.precision, 0)
    identity["teacher.classes"] = (
        ""
        if names is None
        else hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()
    )
    manifest = Manifest(
        identity=identity,
        layout=layout,
        num_samples=len(train),
        num_views=work.num_views,
        part_size=options.part_size,
        about={
            "teacher": name,
            "versions": versions(),
            "network": network_to_json(network),
            "classes": list(chosen.classes),
            "command": shlex.join(["vitdistill", *sys.argv[1:]]),
            "imported_from": str(answers.path),
        },
    )
    place = Path(output) / name
    there = LabelStore.open(place).status().records if (place / MANIFEST).is_file() else 0
    left = len(train) * work.num_views - there
    if left > 0:
        require_free(place, layout.record_bytes * left + 1_000_000)
    store = LabelStore.create(place, manifest)
    say(
        f"{name}: {describe(layout)}, {layout.record_bytes} bytes a record, {len(train):,} images x"
        f" {work.num_views} views"
    )
    with StopRequest() as stop:
        work.write(store, lambda: stop.name, say)
    return store


def _teacher_of(recipe: Recipe, teacher: str | None) -> str:
    known = ", ".join(recipe.teachers)
    if not recipe.teachers:
        raise ConfigError(
            "the recipe has no teacher whose answers these could be: take one that has, or add one"
            " (--with kd)"
        )
    if teacher is None and len(recipe.teachers) > 1:
        raise ConfigError(
            f"the recipe has several teachers ({known}): say whose answers these are (--teacher"
            " NAME)"
        )
    if teacher is not None and teacher not in recipe.teachers:
        raise ConfigError(
            f"the recipe has no teacher {teacher!r}, only {known}: name one of them (--teacher"
            " NAME)"
        )
    return next(iter(recipe.teachers)) if teacher is None else teacher


def _student(recipe: Recipe, num_classes: int) -> Built:
    """The student for its input and its description, with weights only where a file of them may
    bring its normalisation.
    """
    student = build_student(
        recipe.student, num_classes, with_weights=bool(recipe.student.checkpoint)
    )
    return replace(student, spec=evaluated_as_trained(student.spec, recipe.data.augment))


# -- classes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chosen:
    """Which of a file's logits are taken (None: all), and the classes they are of."""

    index: I64 | None
    classes: tuple[str, ...]


def _names(answers: AnswerFile, file: str | Path | None) -> tuple[str, ...] | None:
    """Names of the file's own classes."""
    where, names = printable(answers.path), answers.classes
    if file is not None:
        given = read_class_names(file)
        if names is not None and names != given:
            raise ConfigError(
                f"{printable(file)} names other classes than {where} itself: leave --classes out,"
                " or correct it"
            )
        where, names = printable(file), given
    if names is None:
        return None
    if len(names) != answers.num_classes:
        raise DataError(
            f"{where} names {len(names)} classes, and {printable(answers.path)} has"
            f" {answers.num_classes} logits a row: name each"
        )
    twice = (
        next((label for label in names if names.count(label) > 1), None)
        if len(set(names)) < len(names)
        else None
    )
    if twice is not None:
        raise DataError(
            f"{where} has two classes called {twice!r}, and one is meant: give them different names"
        )
    return names


def _choose(
    recipe: Recipe,
    name: str,
    answers: AnswerFile,
    names: tuple[str, ...] | None,
    folders: tuple[str, ...],
    say: Callable[[str], None],
) -> _Chosen:
    file, count = printable(answers.path), answers.num_classes
    if not folders:
        say(f"{file}: the images are unlabelled, so its {count} classes are kept")
        return _Chosen(None, names or ())
    if names is None and count != len(folders):
        raise DataError(
            f"{file} has {count} logits a row, and the data set has {len(folders)} classes: name"
            " those of the file, so that the data set's can be picked (--classes FILE, one name a"
            " line)"
        )
    match = match_classes(
        name, names, count, folders, recipe.teachers[name].reorder_classes, source=file
    )
    say(f"{file}: {match.remark}")
    return _Chosen(None if match.index is None else np.array(match.index, dtype=np.int64), folders)


# -- rows -----------------------------------------------------------------------------------------


class _Import:
    """The rows of a file on their way into a store.

    Attributes:
        num_views: of the file, after `scan`.
    """

    def __init__(
        self,
        recipe: Recipe,
        answers: AnswerFile,
        index: I64 | None,
        loader: TrainLoader,
        layout: Layout,
        part_size: int,
        memory: int,
    ) -> None:
        self.recipe, self.answers, self.index, self.loader, self.layout = (
            recipe,
            answers,
            index,
            loader,
            layout,
        )
        self.part_size, self.memory = part_size, memory
        self.source: ImageSource = loader.source
        self.file = printable(answers.path)
        self.num_views = 0
        self._keys: dict[str, int] = {}
        self._guesses: dict[int, int] = {}

    def _named(self, place: int) -> str:
        view, sample = divmod(place, len(self.source))
        return f"view {view} of sample {sample} ({printable(self.source.key(sample))})"

    def scan(self) -> None:
        """Read every row and find out what it is of.

        Raises:
            DataError: a sample is unknown or a view negative; an answer is missing, or there are
                two different ones; the rows are in such a disorder that they cannot be brought in
                order.
            NonFiniteError: an answer is not finite.
            ConfigError: the recipe has another number of views.
        """
        size = len(self.source)
        probe = np.zeros(size, dtype=bool)
        probe[keyed.permutation(0, 0, size, keyed.Stream.SUBSET)[:NUM_IMAGES]] = True
        places = np.empty(self.answers.num_rows, dtype=np.int64)
        pixels: list[npt.NDArray[np.uint32]] = []
        for rows, logits in self._rows():
            samples = self._samples(rows)
            self._check(rows, samples, logits)
            places[rows.first : rows.first + len(samples)] = rows.views * size + samples
            if rows.pixels is not None:
                pixels.append(rows.pixels)
            due = np.flatnonzero((rows.views == 0) & probe[samples])
            self._guesses |= dict(
                zip(samples[due].tolist(), logits[due].argmax(axis=1).tolist(), strict=True)
            )
        distinct, row_of = np.unique(places, return_index=True)
        self._places, self._row_of = places, row_of.astype(np.int64)
        self._check_complete(distinct)
        if len(distinct) < len(places):
            self._check_twins()
        self._pixels = np.concatenate(pixels)[row_of] if pixels else None
        held = self._most_held()
        if held > self.memory // 2:
            raise DataError(
                f"the rows of {self.file} are in no order, so that {format_bytes(held)} of answers"
                " would have to wait in memory for the rest of their part"
                f" ({format_bytes(self.memory)} are free): sort the file by view and sample_id"
            )

    def _rows(self) -> Iterator[tuple[Rows, F32]]:
        """All rows, with the logits of the data set's classes."""
        for rows in self.answers.rows():
            yield rows, rows.logits if self.index is None else rows.logits[:, self.index]

    def _samples(self, rows: Rows) -> I64:
        if isinstance(rows.samples, list):
            if not self._keys:
                self._keys = {self.source.key(i): i for i in range(len(self.source))}
            found = np.fromiter(
                (self._keys.get(key, -1) for key in rows.samples), np.int64, len(rows.samples)
            )
            unknown = np.flatnonzero(found < 0)
            if len(unknown):
                raise DataError(
                    f"{self.file} has the sample {printable(rows.samples[unknown[0]])!r} in row"
                    f" {rows.first + unknown[0]}, which is no training image of {self.source.name}:"
                    f" give keys like {printable(self.source.key(0))!r}, or numbers"
                )
            return found
        wrong = np.flatnonzero((rows.samples < 0) | (rows.samples >= len(self.source)))
        if len(wrong):
            raise DataError(
                f"{self.file} has the sample {rows.samples[wrong[0]]} in row"
                f" {rows.first + wrong[0]}, and the training images of {self.source.name} are 0 to"
                f" {len(self.source) - 1}: are these answers of other images?"
            )
        return rows.samples

    def _check(self, rows: Rows, samples: I64, logits: F32) -> None:
        wrong = np.flatnonzero((rows.views < 0) | (rows.views >= 2**31))
        if len(wrong):
            raise DataError(
                f"{self.file} has the view {rows.views[wrong[0]]} in row {rows.first + wrong[0]}:"
                " views count from 0"
            )
        bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        if len(bad):
            named = self._named(int(rows.views[bad[0]]) * len(self.source) + int(samples[bad[0]]))
            raise NonFiniteError(
                f"{self.file} has a logit that is NaN, infinite or beyond float32 in row"
                f" {rows.first + bad[0]}, {named}: make that answer again"
            )

    def _check_complete(self, distinct: I64) -> None:
        size = len(self.source)
        self.num_views = int(distinct[-1]) // size + 1
        wanted = self.recipe.data.views
        total = self.num_views * size
        if len(distinct) < total:
            gaps = np.flatnonzero(distinct != np.arange(len(distinct)))
            first = int(gaps[0]) if len(gaps) else len(distinct)
            raise DataError(
                f"{self.file} has no answer to {self._named(first)}, and lacks"
                f" {total - len(distinct):,} of {total:,} in all: every training image needs one in"
                f" each view from 0 to {self.num_views - 1}"
            )
        if wanted is not None and wanted != self.num_views:
            raise ConfigError(
                f"{self.file} answers to {self.num_views} views of each image, and the recipe shows"
                f" {wanted} (data.views): set --views {self.num_views}, or give the answers to"
                f" {wanted}"
            )

    def _check_twins(self) -> None:
        """Two answers to one view are one if they are equal."""
        twin = np.ones(len(self._places), dtype=bool)
        twin[self._row_of] = False  # these are the first ones
        wanted = np.zeros(len(self._row_of), dtype=bool)
        wanted[self._places[twin]] = True
        seen: dict[int, tuple[int, bytes]] = {}
        for rows, logits in self._rows():
            places = self._places[rows.first : rows.first + len(logits)]
            for at in np.flatnonzero(wanted[places]).tolist():
                place, row = int(places[at]), rows.first + at
                digest = hashlib.blake2b(logits[at].tobytes(), digest_size=16).digest()
                first, other = seen.setdefault(place, (row, digest))
                if other != digest:
                    raise DataError(
                        f"{self.file} has two different answers to {self._named(place)}, in rows"
                        f" {first} and {row}: keep one of them"
                    )

    def _most_held(self) -> int:
        """Bytes of the logits of parts that are begun and not complete, at most, when rows come in
        the file's order.
        """
        starts = np.arange(0, len(self.source), self.part_size)
        rows = self._row_of.reshape(self.num_views, -1)
        begin, end = (
            np.minimum.reduceat(rows, starts, axis=1),
            np.maximum.reduceat(rows, starts, axis=1),
        )
        logits = self.layout.logits
        assert logits is not None
        sizes = np.diff(starts, append=len(self.source)) * logits.num_classes * 4
        change = np.concatenate([np.tile(sizes, self.num_views), -np.tile(sizes, self.num_views)])
        order = np.argsort(np.concatenate([begin.ravel(), end.ravel()]), kind="stable")
        return int(change[order].cumsum().max())

    def prove(self, name: str, say: Callable[[str], None]) -> None:
        """Compare the answers of this teacher with the labels; raises `ConfigError` when they are
        not better than chance.
        """
        shown_most = self.loader.most_of(
            0, np.fromiter(self._guesses, np.int64, len(self._guesses))
        )
        proof = judge(
            str(self.file),
            [
                (int(self.source.labels[sample]), answer)
                for sample, answer in zip(shown_most, self._guesses.values(), strict=True)
            ],
            self.source.classes,
            images="training images",
            reason=(
                "they are of other images (training images are counted from 0 in the order of their"
                " classes and keys), or its classes are in another order (name them: --classes"
                " FILE)"
            ),
            reorder=(
                "name them in its order (--classes FILE) and pass"
                f" {setting(name, 'reorder_classes')}"
            ),
        )
        say(
            f"{self.file}: right on {proof.accuracy:.1%} of {proof.num_images} training images"
            f" (chance {proof.chance:.1%})"
        )

    def check_first_pixels(self) -> None:
        """Compare the first checksums the file has, before anything is written."""
        if self._pixels is not None:
            last = min(self.recipe.train.eval_batch_size, len(self.source))
            for batch in self.loader.labelling(0, 0, last, last):
                self._check_pixels(0, batch.ids, batch.checksums)

    def _check_pixels(self, view: int, ids: I64, checksums: npt.NDArray[np.uint32]) -> None:
        if self._pixels is None:
            return
        wrong = np.flatnonzero(self._pixels[view * len(self.source) + ids] != checksums)
        if len(wrong):
            named = self._named(view * len(self.source) + int(ids[wrong[0]]))
            raise DataError(
                f"{self.file} answers to another {named} than this recipe makes (its pixels differ,"
                f" as do those of {len(wrong)} of {len(ids)}): give the images, the seed, the"
                " augmentation and the student's input size that it was made with"
            )

    def write(self, store: LabelStore, stop: Callable[[], str], say: Callable[[str], None]) -> None:
        """Seal every part that is missing, as soon as its rows have been read."""
        size, logits = len(self.source), self.layout.logits
        assert logits is not None
        missing = np.zeros(self.num_views * store.num_parts, dtype=bool)
        missing[[view * store.num_parts + part for view, part in store.missing_parts()]] = True
        total, done = len(missing), int((~missing).sum())
        if done:
            say(f"{done} of {total} parts are there already")
        shown_at = time.monotonic()
        waiting: dict[int, F32] = {}
        filled: dict[int, int] = {}
        for rows, values in self._rows() if done < total else ():
            places = self._places[rows.first : rows.first + len(values)]
            views, samples = np.divmod(places, size)
            parts = views * store.num_parts + samples // self.part_size
            # Of equal answers the first is taken.
            due = missing[parts] & (self._row_of[places] == rows.first + np.arange(len(values)))
            for number in np.unique(parts[due]).tolist():
                view, part = divmod(number, store.num_parts)
                lo, hi = store.part_range(part)
                mine = np.flatnonzero(due & (parts == number))
                waiting.setdefault(
                    number, np.empty((hi - lo, logits.num_classes), dtype=np.float32)
                )[samples[mine] - lo] = values[mine]
                filled[number] = filled.get(number, 0) + len(mine)
                if filled[number] == hi - lo:
                    store.seal(view, part, self._records(view, lo, hi, waiting.pop(number), stop))
                    done += 1
                    if time.monotonic() - shown_at > 10.0:
                        shown_at = time.monotonic()
                        say(f"{done} of {total} parts")

    def _records(
        self, view: int, lo: int, hi: int, answers: F32, stop: Callable[[], str]
    ) -> npt.NDArray[Any]:
        made = []
        for batch in self.loader.labelling(view, lo, hi, self.recipe.train.eval_batch_size):
            if stop():
                raise Preempted(
                    f"stopped by {stop()}; what is written stays, and the same command goes on from"
                    " there"
                )
            self._check_pixels(view, batch.ids, batch.checksums)
            keys = keyed.keys(self.recipe.data_seed, view, batch.ids, keyed.Stream.LABELS)
            made.append(
                self.layout.encode(
                    torch.from_numpy(answers[batch.ids - lo]), {}, None, batch.checksums, keys
                )
            )
        return np.concatenate(made)
