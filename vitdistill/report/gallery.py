"""Pictures in a report: what runs drew, and images on which student and teacher part."""

from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..data.sources.base import ImageSource
from ..errors import UserError
from ..methods.base import Objective
from .answers import Answers, open_validation
from .document import Block, Picture, Pictures, Strong, Table
from .files import Run
from .groups import Group

NUM_CONFUSIONS = 6
NUM_PARTED = 8
WIDEST = 1400  # pixels of a sheet
SIDE = 160  # pixels of an image


def saved_pictures(groups: Sequence[Group]) -> list[Block]:
    """Return what the first run of each recipe drew of a few images, drawn anew from its file."""
    found: list[Block] = []
    for group in groups:
        run = next((run for run in group.runs if run.pictures), None)
        if run is None or run.pictures is None:
            continue
        try:
            with Image.open(run.pictures) as image:
                png = _png(image.convert("RGB"), WIDEST)
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
            found.append([Strong(group.name), f": {run.pictures.name} cannot be read."])
            continue
        what = _shown(group)
        found.append(Picture(png, f"{group.name}: {what}", [Strong(group.name), f": {what}"]))
    return found


def _shown(group: Group) -> str:
    what = [] if group.recipe.selector is None else ["the patches its teacher saw"]
    what += [f"what {name} predicts of hidden patches" for name in _drawing(group)]
    return f"{' and '.join(what) or 'a few images'}, at its last evaluation"


def _drawing(group: Group) -> list[str]:
    objectives = group.recipe.objectives.items()
    return [name for name, o in objectives if type(o).pictures is not Objective.pictures]


def confusions(groups: Sequence[Group]) -> Iterator[Block]:
    """Yield the pairs of classes that each recipe confuses most, over its runs."""
    counts = {group.name: _confused(group) for group in groups}
    counts = {name: found for name, found in counts.items() if found}
    total = sum(counts.values(), Counter[tuple[str, str]]())
    pairs = [pair for pair, _ in total.most_common(NUM_CONFUSIONS)]
    if pairs:
        rows = [
            (f"{true} taken for {said}", *(str(found[true, said]) for found in counts.values()))
            for true, said in pairs
        ]
        caption = "The classes confused most, in images over all runs of a recipe"
        yield Table(caption, ("", *counts), rows)


def _confused(group: Group) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    for run in group.runs:
        if run.answers is not None:
            names, wrong = run.answers.classes, np.flatnonzero(~run.answers.right)
            pairs = zip(run.answers.labels[wrong], run.answers.student[wrong], strict=True)
            found.update((names[a], names[b]) for a, b in pairs)
    return found


def parted_pictures(groups: Sequence[Group]) -> Iterator[Block]:
    """Yield images that one of student and teacher answers rightly, of each taught recipe."""
    for group in groups:
        run = group.runs[0]
        if run.answers is None or not run.answers.teachers:
            continue
        teacher, said = next(iter(run.answers.teachers.items()))
        of_teacher = said == run.answers.labels
        lost, won = (of_teacher & ~run.answers.right).sum(), (run.answers.right & ~of_teacher).sum()
        yield [
            Strong(group.name),
            f": of {len(said):,} images its teacher alone is right on {lost}, the student alone on"
            f" {won}.",
        ]
        pictures = _pictures(run, run.answers, teacher)
        if pictures:
            yield Pictures(pictures)


def _pictures(run: Run, answers: Answers, teacher: str) -> list[Picture]:
    """Return the first images on which they part, if the images are still what they were."""
    try:
        source = open_validation(run.recipe)
    except UserError:
        return []
    if source is None or source.fingerprint() != answers.images:
        return []
    said, right = answers.teachers[teacher], answers.right
    parted = np.flatnonzero(right != (said == answers.labels))
    order = sorted(parted.tolist(), key=lambda i: (bool(right[i]), i))
    return [_picture(source, answers, teacher, i) for i in order[:NUM_PARTED]]


def _picture(source: ImageSource, answers: Answers, teacher: str, i: int) -> Picture:
    names = answers.classes
    true, ours = names[answers.labels[i]], names[answers.student[i]]
    rest = f"; the student says {ours}, {teacher} {names[answers.teachers[teacher][i]]}"
    png = _png(source.load(i), SIDE)
    return Picture(png, f"an image of {true}{rest}", [Strong(true), rest])


def _png(image: Image.Image, longest: int) -> bytes:
    image.thumbnail((longest, longest))
    data = BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
