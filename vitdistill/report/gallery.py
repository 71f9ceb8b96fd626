"""Pictures in a report: what runs drew, and images on which student and teacher differ."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UserError
from ..methods.base import Objective
from ..runs.folder import FIRST_PICTURES, PICTURES
from ..runs.pictures import png
from .answers import Answers, open_validation
from .document import MOST_COLUMNS, Block, Picture, Pictures, Strong, Table
from .files import Run
from .groups import Group

NUM_CONFUSIONS = 6
NUM_PARTED = 8
MOST_DRAWN = 4
WIDEST = 1400  # pixels of a sheet
SIDE = 160  # pixels of an image


def saved_pictures(groups: Sequence[Group]) -> Iterator[Block]:
    """Yield the first and last pictures of the best groups that saved any, re-encoded."""
    drawn = [(g, r.path) for g in groups for r in g.runs[:1] if (r.path / PICTURES).is_file()]
    for group, folder in drawn[:MOST_DRAWN]:
        files = [folder / FIRST_PICTURES, folder / PICTURES]
        if not files[0].is_file() or files[0].read_bytes() == files[1].read_bytes():
            files.pop(0)
        try:
            yield Pictures([_sheet(group, file) for file in files])
        except (OSError, Image.DecompressionBombError):
            yield [Strong(group.name), f": the pictures in {folder} cannot be read."]
    if drawn[MOST_DRAWN:]:
        names = ", ".join(group.name for group, _ in drawn[MOST_DRAWN:])
        yield [f"{PICTURES} in the folders of the runs shows the same of ", Strong(names), "."]


def _sheet(group: Group, file: Path) -> Picture:
    what = [] if group.recipe.selector is None else ["the patches its teacher saw"]
    for name, objective in group.recipe.objectives.items():
        if type(objective).pictures is not Objective.pictures:
            what.append(f"what {name} predicts of hidden patches")
    when = "first" if file.name == FIRST_PICTURES else "last"
    text = f": {' and '.join(what) or 'a few images'}, at its {when} evaluation"
    with Image.open(file) as image:
        return _picture(image.convert("RGB"), WIDEST, group.name, text)


def _picture(image: Image.Image, longest: int, name: str, text: str) -> Picture:
    image.thumbnail((longest, longest))
    return Picture(png(image), name + text, [Strong(name), text])


def confusions(groups: Sequence[Group]) -> Iterator[Block]:
    """Yield the pairs of classes that the best recipes confuse most, over their runs."""
    counts: dict[str, Counter[str]] = {}
    for group in groups:
        for answers in (run.answers for run in group.runs if run.answers is not None):
            wrong, names = ~answers.right, answers.classes
            pairs = zip(answers.labels[wrong], answers.student[wrong], strict=True)
            found = counts.setdefault(group.name, Counter())
            found.update(f"{names[true]} taken for {names[said]}" for true, said in pairs)
    best = dict([*counts.items()][:MOST_COLUMNS])
    total = sum(best.values(), Counter[str]()).most_common(NUM_CONFUSIONS)
    rows = [(pair, *(str(found[pair]) for found in best.values())) for pair, _ in total]
    if rows:
        caption = "The classes confused most, in images over all runs of a row"
        yield Table(caption, ("true class, answer", *best), rows)


def parted_pictures(groups: Sequence[Group]) -> Iterator[Block]:
    """Yield how many images only one of student and teacher answers correctly, and shows some."""
    asked = [(g, a) for g in groups if (a := g.runs[0].answers) is not None and a.teachers]
    rows = []
    for group, a in asked:
        counts = len(a.right), (a.taught & ~a.right).sum(), (a.right & ~a.taught).sum()
        rows.append((group.name, *(f"{count:,}" for count in counts)))
    if rows:
        head = "name", "images", "only the teacher", "only the student"
        yield Table("Images that only one of the two answers correctly, in a run", head, rows)
        if pictures := _pictures(asked[0][0].runs[0], asked[0][1]):
            about = ["Some of those of ", Strong(rows[0][0]), ":"]
            yield Pictures(pictures, small=True, about=about)


def _pictures(run: Run, answers: Answers) -> list[Picture]:
    """Return images that one of the two answers correctly, if they are still what they were."""
    source = None
    with suppress(UserError):
        source = open_validation(run.recipe)
    if source is None or source.fingerprint() != answers.images:
        return []
    found, names, right = [], answers.classes, answers.right
    teacher, said = next(iter(answers.teachers.items()))
    parted = np.flatnonzero(right != answers.taught)
    for i in sorted(parted.tolist(), key=lambda i: (right[i], i))[:NUM_PARTED]:
        true, ours = names[answers.labels[i]], names[answers.student[i]]
        rest = f"; the student says {ours}, {teacher} {names[said[i]]}"
        found.append(_picture(source.load(i), SIDE, true, rest))
    return found
