"""The report on runs: verdicts, tables, charts, pictures."""

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..messages import plural
from ..recipes.config import Recipe
from ..runs.preflight import NUM_IMAGES
from .document import Block, Document, Strong, Table, Text, Verdicts
from .figures import draw_curves, draw_scatters
from .files import find_runs, read_run
from .gallery import confusions, parted_pictures, saved_pictures
from .groups import Group, Question, ask_questions, group_runs
from .tables import tabulate_costs, tabulate_scores
from .verdict import ERROR_RATE


def make_report(
    paths: Sequence[str | Path], say: Callable[[str], None] = lambda text: None
) -> Document:
    """Return the report on the runs in and below ``paths``; `UserError` for damaged files.

    ``say`` is told what is being done where that takes its time.
    """
    folders = find_runs(paths)
    say(f"reading {plural(len(folders), 'run')}")
    runs = [read_run(path) for path in folders]
    say("counting what training, labels and predictions cost")
    groups = group_runs(runs)
    say("drawing charts and pictures")
    sections: dict[str, Sequence[Block]] = {
        "Did it help?": _verdicts(groups),
        "Results": [
            tabulate_scores(groups),
            tabulate_costs(groups),
            *_notes(groups),
        ],
        "Accuracy against cost": draw_scatters(groups),
        "Curves": draw_curves(groups),
        "Pictures": [*saved_pictures(groups)],
        "Answers": [*confusions(groups), *parted_pictures(groups)],
        "What differs between the recipes": _differences(groups),
        "Where they ran": _environments(groups),
    }
    about = f"{plural(len(runs), 'run')} of {plural(len(groups), 'recipe')}"
    found = [(title, blocks) for title, blocks in sections.items() if blocks]
    return Document("Distillation report", about, found)


# --- verdicts ------------------------------------------------------------------------------------


def _verdicts(groups: Sequence[Group]) -> list[Block]:
    questions = ask_questions(groups)
    if not questions:
        why = (
            "Whether a teacher helped is unknown: that needs finished runs of the same student"
            " with and without one, judged on the same images."
        )
        return [[why]]
    how = (
        "Each recipe with a teacher is compared with the best recipe that trains the same student"
        " without one, and with the first recipe here that has a teacher. The verdict is better or"
        f" not better if the {1 - ERROR_RATE:.0%} confidence interval of the difference in top-1,"
        " over seeds and over images, excludes zero. If two recipes are equally good, chance alone"
        f" makes the verdict better in at most {ERROR_RATE / 2:.1%} of comparisons, and not better"
        " in as many."
    )
    if any(q.best_of > 1 for q in questions):
        how += (
            " The best of several recipes without a teacher owes something to luck: against it,"
            " better is a rarer verdict, and not better a more frequent one."
        )
    if any(q.comparison.num_seeds < 2 for q in questions):
        how += " One run of a recipe cannot tell what other seeds would give: two are needed."
    alone = "Whether a teacher helped is unknown: none of these students was trained without one."
    first: list[Block] = [] if any(q.best_of for q in questions) else [[alone]]
    return [*first, Verdicts([(q.comparison.verdict, _sentence(q)) for q in questions]), [how]]


def _sentence(question: Question) -> Text:
    found, ratio = question.comparison, question.cost_ratio
    low, high, images = (f"{100 * v:+.1f}" for v in (found.low, found.high, found.images_error))
    best = f"best of {question.best_of} recipes of the " if question.best_of > 1 else ""
    text = f", the {best}same student without a teacher" if question.best_of else ""
    alone = " by one run each" if found.num_seeds < 2 else ""
    text += f": {100 * found.difference:+.1f} points of top-1{alone}, between {low} and {high}."
    text += f" It took {ratio:.2g} times the training compute." if ratio else ""
    text += f" Standard error: {images[1:]} over images"
    if found.num_seeds > 1:
        runs = "pairs of runs" if found.paired else "runs each, or more"
        text += f", {100 * found.seeds_error:.1f} over {found.num_seeds} {runs}"
    return [Strong(question.ours.name), " against ", Strong(question.theirs.name), f"{text}."]


def _notes(groups: Sequence[Group]) -> Iterator[Block]:
    about = [(g.name, g.runs[0].recipe.description or g.runs[0].whole.description) for g in groups]
    if told := [row for row in about if row[1]]:
        caption = "What each recipe is; all settings that differ are listed below"
        yield Table(caption, ("recipe", "is"), told, prose=True)
    yield [
        "Top-1, calibration error (15 bins) and negative log-likelihood (nats an image) are of the"
        " last weights on the validation images (best epoch: of the weights in best/, which were"
        " chosen on these very images); ± is a standard error, in points. A teacher's top-1 is"
        " measured on the validation images as its student sees them; the number of images follows"
        f" it. It is at most {NUM_IMAGES}, those on which the teacher was tried before training,"
        " unless its answers to all of them were kept. A multiply-accumulate is 2 FLOPs. All"
        " together includes stored labels and the training of those runs here whose weights were"
        " needed, but not the training of any other teacher. Memory is calculated, for a step of"
        " one process in float32; time and speed were measured."
    ]
    names = []
    for group in groups:
        done = [run for run in group.runs if "top1" in run.scores]
        lacking = sum(run.answers is None for run in done)
        few = f" ({lacking} of {len(done)} runs)" if lacking < len(done) else ""
        names += [f"{group.name}{few}"] if lacking else []
    if names:
        yield [
            "Single answers were not kept of ",
            Strong(", ".join(names)),
            ": how often these agree with their teacher is unknown, and their errors over images"
            " are estimated as if networks erred independently of each other.",
        ]


# --- recipes and machines ------------------------------------------------------------------------


def _differences(groups: Sequence[Group]) -> list[Block]:
    """Tabulate the settings that differ, but for defaults of parts that some recipes lack."""
    makers = {digest: group.name for group in groups for r in group.runs for digest in r.weights}
    defaults: set[tuple[str, str]] = set()
    flat: list[dict[str, Any]] = []
    for group in groups:
        run = group.runs[0]
        recipe, values = run.recipe, run.settings
        parts: dict[str, Any] = {"selector": recipe.selector, "masking": recipe.masking}
        parts["data.augment"] = recipe.data.augment
        parts |= {f"objectives.{name}": o for name, o in recipe.objectives.items()}
        parts |= {f"teachers.{name}": t for name, t in recipe.teachers.items()}
        known = {path: fields(part) for path, part in parts.items() if part is not None}
        defaults |= {(f"{p}.{i.name}", _exact(i.default)) for p, its in known.items() for i in its}
        idle = {f"data.augment.{name}" for name in vars(recipe.data.augment)}
        idle -= {f"data.augment.{name}" for name in recipe.data.augment.effective()}
        values |= {f: f"the run {makers[d]}" for f, d in run.needed.items() if d in makers}
        flat.append(
            {f: v for f, v in values.items() if v not in (None, {}, [], ()) and f not in idle}
        )
    rows = []
    sections = [part.name for part in fields(Recipe)]
    names = dict.fromkeys(field for values in flat for field in values)
    for field in sorted(names, key=lambda name: sections.index(name.partition(".")[0])):
        cells = show_values([values.get(field, "") for values in flat])
        told = {_exact(values[field]) for values in flat if field in values}
        if len({*cells}) > 1 and not (len(told) == 1 and (field, *told) in defaults):
            rows.append((field, *cells))
    caption = "Settings that are not the same in all; empty: it has none, or none that acts"
    table = Table(caption, ("setting", *(g.name for g in groups)), rows)
    return [*table.parts()] if rows else []


def show_values(values: Sequence[Any]) -> list[str]:
    """Return what is shown of a setting in several recipes: what differs looks different."""
    exact = [_exact(value) for value in values]
    short = [f"{v:g}" if type(v) is float else text for v, text in zip(values, exact, strict=True)]
    return short if len({*short}) == len({*exact}) else exact


def _exact(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _environments(groups: Sequence[Group]) -> list[Block]:
    """Tabulate what runs ran on, notes on their images, and how each was started."""
    versions: dict[str, dict[str, None]] = {}
    notes: dict[str, dict[str, None]] = {}
    folders = []
    for group, run in ((g, run) for g in groups for run in g.runs):
        found = dict(run.environment)
        command = shlex.join(map(str, found.pop("command", ())))
        folders.append((str(run.path), group.name, str(run.seed[0]), command))
        for note in found.pop("images", ()):
            notes.setdefault(str(note), {})[group.name] = None
        for key, value in found.items():
            text = ", ".join(map(str, value)) if isinstance(value, list) else _exact(value)
            versions.setdefault(key, {})[text] = None
    lines = [(key, "; ".join(texts)) for key, texts in versions.items() if any(texts)]
    about = [(", ".join(names), note) for note, names in notes.items()]
    tables = (
        Table("Versions and machines; several where runs differ", ("what", "value"), lines, True),
        Table("Notes on the images", ("recipes", "note"), about, True),
        Table(
            "Folders, and how each was begun", ("run", "recipe", "seed", "command"), folders, True
        ),
    )
    return [table for table in tables if table.rows]
