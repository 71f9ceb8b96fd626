"""What is said of runs: verdicts, tables, charts, pictures."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

from ..messages import plural
from .document import Block, Document, Strong, Table, Text, Verdicts
from .figures import draw_curves, draw_scatters
from .files import find_runs, read_run
from .gallery import confusions, parted_pictures, saved_pictures
from .groups import Group, Question, ask_questions, group_runs
from .tables import tabulate_costs, tabulate_scores
from .verdict import ERROR_RATE


def make_report(paths: Sequence[str | Path]) -> Document:
    """Return the report on the runs in and below ``paths``; `UserError` for damaged files."""
    runs = [read_run(path) for path in find_runs(paths)]
    groups = group_runs(runs)
    sections: dict[str, Sequence[Block]] = {
        "Did it help?": _verdicts(groups),
        "What each recipe came to": [
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
            "Whether a teacher helped cannot be said: that needs finished runs of the same student"
            " with and without one, judged on the same images."
        )
        return [[why]]
    how = (
        f"Better and not better are said where the {1 - ERROR_RATE:.0%} interval of the difference"
        " in top-1, over seeds and over images, leaves out zero. Of two recipes that are equal, at"
        f" most {ERROR_RATE / 2:.1%} of the answers are better, by chance, and as many not better."
    )
    if any(q.comparison.num_seeds < 2 for q in questions):
        how += " One run of a recipe cannot tell what other seeds would give: two are needed."
    if all(q.theirs.taught for q in questions):
        how += " Whether a teacher helped cannot be said: no such student is trained without one."
    return [Verdicts([(q.comparison.verdict, _sentence(q)) for q in questions]), [how]]


def _sentence(question: Question) -> Text:
    found, ratio = question.comparison, question.cost_ratio
    low, high, images = (f"{100 * v:+.1f}" for v in (found.low, found.high, found.images_error))
    text = "" if question.theirs.taught else " (the student without a teacher)"
    alone = " by one run each" if found.num_seeds < 2 else ""
    text += f": {100 * found.difference:+.1f} points of top-1{alone}, between {low} and {high}."
    text += f" It took {ratio:.2g} times the training compute." if ratio else ""
    text += f" Standard error: {images[1:]} over images"
    if found.num_seeds > 1:
        runs = "pairs of runs" if found.paired else "runs each, or more"
        text += f", {100 * found.seeds_error:.1f} over {found.num_seeds} {runs}"
    return [Strong(question.ours.name), " against ", Strong(question.theirs.name), f"{text}."]


def _notes(groups: Sequence[Group]) -> Iterator[Block]:
    about: dict[str, list[str]] = {}
    for group in groups:
        about.setdefault(group.recipe.description, []).append(group.name)
    about.pop("", None)
    if about:
        said = ([Strong(", ".join(names)), f": {text}. "] for text, names in about.items())
        own = "What recipes say of themselves; what else was set is among the differences below. "
        yield [own, *chain.from_iterable(said)]
    yield [
        "Top-1, calibration error (15 bins) and negative log-likelihood (nats an image) are of the"
        " last weights on the validation images (best epoch: of those that did best on these very"
        " images, in best/); ± is a standard error, in points. A"
        " multiply-accumulate is 2 FLOPs. All together counts stored labels too, and those of these"
        " runs whose weights were needed, but not how any other teacher was trained. Memory is"
        " counted, for a step of one process in float32; time and speed were measured."
    ]
    if any(run.answers is None and run.summary for group in groups for run in group.runs):
        yield [
            "The answers of some runs were not kept one by one: how often they agree with their"
            " teacher is not known, and errors over images are taken as if networks erred"
            " independently of each other."
        ]


# --- recipes and machines ------------------------------------------------------------------------


def _differences(groups: Sequence[Group]) -> list[Block]:
    """Tabulate the settings that differ, but for defaults of parts that some recipes lack."""
    makers = {digest: group.name for group in groups for r in group.runs for digest in r.weights}
    defaults: set[tuple[str, str]] = set()
    flat = []
    for group in groups:
        run = group.runs[0]
        recipe, values = run.recipe, run.settings
        parts: dict[str, Any] = {"selector": recipe.selector, "masking": recipe.masking}
        parts |= {f"objectives.{name}": o for name, o in recipe.objectives.items()}
        parts |= {f"teachers.{name}": t for name, t in recipe.teachers.items()}
        known = {path: fields(part) for path, part in parts.items() if part is not None}
        defaults |= {(f"{p}.{i.name}", _plain(i.default)) for p, its in known.items() for i in its}
        values |= {f: f"the run {makers[d]}" for f, d in run.identity.items() if d in makers}
        flat.append({f: _plain(v) for f, v in values.items() if v not in (None, {}, [], ())})
    rows = []
    for field in dict.fromkeys(field for values in flat for field in values):
        cells = [values.get(field, "") for values in flat]
        told = {cell for cell in cells if cell}
        if len({*cells}) > 1 and not (len(told) == 1 and (field, *told) in defaults):
            rows.append((field, *cells))
    caption = "Settings that are not the same in all; empty: none"
    table = Table(caption, ("setting", *(g.name for g in groups)), rows)
    return [*table.parts()] if rows else []


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _environments(groups: Sequence[Group]) -> list[Block]:
    found: dict[str, dict[str, None]] = {}
    every = [item for g in groups for run in g.runs for item in run.environment.items()]
    for key, value in every:
        text = " ".join(map(str, value)) if isinstance(value, list) else _plain(value)
        if text:
            found.setdefault(key, {})[text] = None
    cells = [(key, "; ".join(texts)) for key, texts in found.items()]
    folders = [(str(run.path), g.name, str(run.seed[0])) for g in groups for run in g.runs]
    machines = Table("Versions and machines; several where runs differ", ("what", "value"), cells)
    return [machines, Table("Folders", ("run", "recipe", "seed"), folders)]
