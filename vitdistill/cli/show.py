"""``vitdistill show``."""

from pathlib import Path

from ..messages import printable
from ..report.show import show
from ..runs.identity import stages_in
from ..runs.pictures import png
from ..storage.atomic import write_atomic
from ..world import join_world
from .arguments import ShowArguments
from .console import say


def run(args: ShowArguments) -> int:
    """Write a sheet of pictures, and print what the networks say of each image."""
    *others, last = stages_in(Path(args.run)) or [Path(args.run)]
    if others:
        places = ", ".join(map(str, others))
        say(f"{args.run} has stages: this is the last, {last}; the others are {places}")
    with join_world(args.device) as world:
        shown = show(Path(args.run), [*map(Path, args.images)], world)
    write_atomic(args.output, png(shown.sheet))
    for path, words in zip(args.images, shown.said, strict=True):
        for name, text in words.items():
            say(f"{printable(path)}: {name}: {', '.join(text)}")
    for note in shown.notes:
        say(note, fold=True)
    say(f"the pictures: {printable(args.output)}")
    return 0
