"""Pictures in a report: what runs drew, and images on which student and teacher part."""

from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UserError
from ..methods.base import Objective
from ..runs.folder import FIRST_PICTURES, PICTURES
from .answers import Answers, open_validation
from .document import Block, Picture, Pictures, Strong, Table
from .files import Run
from .groups import Group

NUM_CONFUSIONS = 6
NUM_PARTED = 8
WIDEST = 1400  # pixels of a sheet
SIDE = 160  # pixels of an image


def saved_pictures(groups: Sequence[Group]) -> Iterator[Block]:
    """Yield what a run of each recipe drew of a few images, early and late, drawn anew."""
    for group in groups:
        folders = (run.path for run in group.runs if (run.path / PICTURES).is_file())
        for folder in [*folders][:1]:
            files = [folder / FIRST_PICTURES, folder / PICTURES]
            if not files[0].is_file() or files[0].read_bytes() == files[1].read_bytes():
                files.pop(0)
            try:
                yield Pictures([_sheet(group, file) for file in files])
            except (OSError, Image.DecompressionBombError):
                yield [Strong(group.name), f": the pictures in {folder} cannot be read."]


def _sheet(group: Group, file: Path) -> Picture:
    what = [] if group.recipe.selector is None else ["the patches its teacher saw"]
    for name, objective in group.recipe.objectives.items():
        if type(objective).pictures is not Objective.pictures:
            what.append(f"what {name} predicts of hidden patches")
    when = "first" if file.name == FIRST_PICTURES else "last"
    text = f": {' and '.join(what) or 'a few images'}, at its {when} evaluation"
    with Image.open(file) as image:
        png = _png(image.convert("RGB"), WIDEST)
    return Picture(png, group.name + text, [Strong(group.name), text])


def confusions(groups: Sequence[Group]) -> Iterator[Block]:
    """Yield the pairs of classes that each recipe confuses most, over its runs."""
    counts = {group.name: _confused(group) for group in groups}
    counts = {name: found for name, found in counts.items() if found}
    total = sum(counts.values(), Counter[tuple[str, str]]())
    rows = [
        (f"{true} taken for {said}", *(str(found[true, said]) for found in counts.values()))
        for (true, said), _ in total.most_common(NUM_CONFUSIONS)
    ]
    if rows:
        caption = "The classes confused most, in images over all runs of a recipe"
        yield from Table(caption, ("true class, answer", *counts), rows).parts()


def _confused(group: Group) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    for answers in (run.answers for run in group.runs if run.answers is not None):
        names, wrong = answers.classes, np.flatnonzero(~answers.right)
        pairs = zip(answers.labels[wrong], answers.student[wrong], strict=True)
        found.update((names[a], names[b]) for a, b in pairs)
    return found


def parted_pictures(groups: Sequence[Group]) -> Iterator[Block]:
    """Yield images that one of student and teacher answers rightly, of each taught recipe."""
    for group in groups:
        run, answers = group.runs[0], group.runs[0].answers
        if answers is None or not answers.teachers:
            continue
        teacher, said = next(iter(answers.teachers.items()))
        taught, right = said == answers.labels, answers.right
        lost, won = (taught & ~right).sum(), (right & ~taught).sum()
        more = " It surpasses its teacher." if won > lost else ""
        yield [
            Strong(group.name),
            f": of {len(said):,} images, its teacher alone answers {lost} correctly, the student"
            f" alone {won}.{more}",
        ]
        order = sorted(np.flatnonzero(right != taught).tolist(), key=lambda i: (right[i], i))
        pictures = _pictures(run, answers, teacher, order[:NUM_PARTED])
        if pictures:
            yield Pictures(pictures, small=True)


def _pictures(run: Run, answers: Answers, teacher: str, which: Sequence[int]) -> list[Picture]:
    """Return these images, if they are still what they were."""
    try:
        source = open_validation(run.recipe)
    except UserError:
        return []
    if source is None or source.fingerprint() != answers.images:
        return []
    found, names = [], answers.classes
    for i in which:
        true, ours = names[answers.labels[i]], names[answers.student[i]]
        rest = f"; the student says {ours}, {teacher} {names[answers.teachers[teacher][i]]}"
        alt = f"an image of {true}{rest}"
        found.append(Picture(_png(source.load(i), SIDE), alt, [Strong(true), rest]))
    return found


def _png(image: Image.Image, longest: int) -> bytes:
    image.thumbnail((longest, longest))
    data = BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
