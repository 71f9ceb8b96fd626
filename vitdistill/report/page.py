"""The report on runs: verdicts, tables, charts, pictures."""

import json
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..messages import plural
from ..recipes.config import Recipe
from ..runs.preflight import NUM_IMAGES
from .document import Block, Document, Strong, Table, Text, Verdicts, Word
from .figures import draw_curves, draw_scatters
from .files import find_runs, read_run
from .gallery import confusions, parted_pictures, saved_pictures
from .groups import Group, Question, ask_questions, group_runs
from .tables import tabulate_costs, tabulate_questions, tabulate_scores
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
    found = group_runs(runs)
    # The best first; first stages and teachers of others last.
    groups = sorted(found, key=lambda group: (group.serves, -group.top1))
    say("drawing charts and pictures")
    sections: dict[str, Sequence[Block]] = {
        "Did it help?": _verdicts(ask_questions(found)),
        "Accuracy against cost": draw_scatters(groups),
        "Results": [tabulate_scores(groups), tabulate_costs(groups), *_notes(groups)],
        "Curves": draw_curves(groups),
        "Pictures": [*saved_pictures(groups)],
        "Answers": [*confusions(groups), *parted_pictures(groups)],
        "What differs": _differences(groups),
        "Where they ran": _environments(groups),
    }
    about = plural(len(runs), "run")
    if len(groups) < len(runs):
        about += f" in {plural(len(groups), 'row')}"
    filled = [(title, blocks) for title, blocks in sections.items() if blocks]
    return Document("Distillation report", about, filled)


# --- verdicts ------------------------------------------------------------------------------------


def _verdicts(questions: Sequence[Question]) -> list[Block]:
    """Say the verdict on the best with a teacher and on the cheapest, and tabulate all."""
    lone = "Whether a teacher helped is unknown: that needs finished runs of the same student with"
    lone += " and without one, judged on the same images."
    if not questions:
        return [[lone]]
    against: dict[str, list[Question]] = {}
    for question in sorted(questions, key=lambda q: not q.best_of):
        against.setdefault(question.theirs.name, []).append(question)
    alone = [asked for asked in against.values() if asked[0].best_of]
    said = [item for asked in alone or against.values() for item in _answer(asked)]
    how = (
        f"The verdict is better or not better if the {1 - ERROR_RATE:.0%} confidence interval of"
        " the difference in top-1, over seeds and over images, excludes zero. If two are equally"
        f" good, chance alone makes it better in at most {ERROR_RATE / 2:.1%} of comparisons, and"
        " not better in as many; the best of several owes something to luck."
    )
    if any(q.comparison.num_seeds < 2 for q in questions):
        how += " One run cannot tell what other seeds would give: two of each are needed."
    elif any(q.comparison.verdict == "cannot tell" for q in questions):
        how += " More seeds narrow the interval."
    tables = map(tabulate_questions, against.values())
    return [*([] if alone else [[lone]]), Verdicts(said), *tables, [how]]


def _answer(asked: Sequence[Question]) -> list[tuple[Word, Text]]:
    """Answer for the best with a teacher and, if that is another one, for the cheapest."""
    best = max(asked, key=lambda q: q.comparison.difference)
    cheapest = min(asked, key=lambda q: (q.cost_ratio or math.inf, -q.comparison.difference))
    of = f" of {len(asked)} with a teacher" if len(asked) > 1 else ""
    if best is cheapest:
        both = " and the cheapest" if best.cost_ratio else ""
        return [_sentence(best, of and f", the best{both}{of}")]
    return [_sentence(best, f", the best{of}"), _sentence(cheapest, f", the cheapest{of}")]


def _sentence(question: Question, note: str) -> tuple[Word, Text]:
    found, ratio, theirs = question.comparison, question.cost_ratio, question.theirs
    text = f" ({theirs.top1:.1%}, {question.measure}): {100 * found.difference:+.1f} points of"
    text += f" top-1, 95% interval {100 * found.low:+.1f} to {100 * found.high:+.1f}"
    text += f", at {ratio:.2g} times the training compute" if ratio else ""
    if found.num_seeds < 2:
        single = all(len(group.runs) < 2 for group in (question.ours, question.theirs))
        text += ", by one run each" if single else ", one of them by a single run"
    text += "."
    ours = f" ({question.ours.top1:.1%}{note}) against "
    return Word(found.verdict), [Strong(question.ours.name), ours, Strong(theirs.name), text]


def _notes(groups: Sequence[Group]) -> Iterator[Block]:
    yield [
        "A row is of the runs that differ in their seeds alone, and has their means. All scores are"
        " of the last weights on the validation images (best epoch: of those in best/, which were"
        " chosen on these very images); calibration error in 15 bins, likelihood in nats an image;"
        f" ± is a standard error, in points. A teacher's top-1 is on up to {NUM_IMAGES} of them as"
        " its student sees them, or on all if its answers were kept. A multiply-accumulate is 2"
        " FLOPs. All together includes stored labels and the training of those runs here whose"
        " weights were needed, but of no other teacher. Memory is calculated, for a step of one"
        " process in float32; time and speed were measured."
    ]
    done = [run for group in groups for run in group.runs if "top1" in run.scores]
    if lacking := sum(run.answers is None for run in done):
        yield [
            f"Single answers were not kept of {lacking} of {plural(len(done), 'run')}: how often"
            " these agree with their teacher is unknown, and their errors over images are estimated"
            " as if networks erred independently of each other."
        ]


# --- recipes and machines ------------------------------------------------------------------------


def _differences(groups: Sequence[Group]) -> list[Block]:
    """Tabulate what each is, and the settings that differ, except those of teachers and defaults of
    parts that some recipes lack.
    """
    rivals = [group for group in groups if group.serves != "teacher"]
    makers = {digest: group.name for group in groups for r in group.runs for digest in r.weights}
    defaults: set[tuple[str, str]] = set()
    flat: list[dict[str, Any]] = []
    for group in rivals:
        run = group.runs[0]
        recipe, augment, values = run.recipe, run.recipe.data.augment, run.settings
        parts: dict[str, Any] = {"selector": recipe.selector, "masking": recipe.masking}
        parts["data.augment"] = augment
        for kind in ("objectives", "teachers"):
            parts |= {f"{kind}.{name}": part for name, part in getattr(recipe, kind).items()}
        known = {path: fields(part) for path, part in parts.items() if part is not None}
        defaults |= {(f"{p}.{i.name}", _exact(i.default)) for p, its in known.items() for i in its}
        idle = {f"data.augment.{name}" for name in {*vars(augment)} - {*augment.effective()}}
        values |= {f: f"the run {makers[d]}" for f, d in run.needed.items() if d in makers}
        idle |= {field for field, value in values.items() if value in (None, {}, [], ())}
        flat.append({f: v for f, v in values.items() if f not in idle})
    rows, sections = [], [part.name for part in fields(Recipe)]
    names = dict.fromkeys(field for values in flat for field in values)
    for field in sorted(names, key=lambda name: sections.index(name.partition(".")[0])):
        cells = show_values([values.get(field, "") for values in flat])
        told = {_exact(values[field]) for values in flat if field in values}
        if len({*cells}) > 1 and not (len(told) == 1 and (field, *told) in defaults):
            rows.append((field, *cells))
    caption = "Settings that differ; empty where a row has none, or none that acts"
    about = [(g.name, g.runs[0].recipe.description or g.runs[0].whole.description) for g in groups]
    began = Table("What each is, apart from the settings below", ("name", "is"), about, True)
    table = Table(caption, ("setting", *(group.name for group in rivals)), rows)
    return [part for part in (began, *table.parts()) if any(row[1] for row in part.rows)]


def show_values(values: Sequence[Any]) -> list[str]:
    """Return a setting of several recipes as text: values that differ look different."""
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
    head = "folder", "name", "seed", "command"
    tables = (
        Table("Versions and machines; several where runs differ", ("what", "value"), lines, True),
        Table("Notes on the images", ("name", "note"), about, True),
        Table("Folders, and how each was begun", head, folders, True),
    )
    return [table for table in tables if table.rows]
