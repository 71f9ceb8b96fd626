"""``vitdistill show``."""

from pathlib import Path

from ..messages import printable
from ..report.show import show
from ..runs.pictures import png
from ..storage.atomic import write_atomic
from ..world import join_world
from .arguments import ShowArguments
from .console import say


def run(args: ShowArguments) -> int:
    """Write a sheet of pictures, and print what the networks say of each image."""
    with join_world(args.device) as world:
        shown = show(Path(args.run), [*map(Path, args.images)], world)
    write_atomic(args.output, png(shown.sheet))
    for path, words in zip(args.images, shown.said, strict=True):
        for name, text in words.items():
            say(f"{printable(path)}: {name}: {', '.join(text)}")
    say(f"the pictures: {printable(args.output)}")
    return 0
