"""``vitdistill recipes``: the named recipes, known without torch."""

import sys

from ..recipes import FAMILIES
from .arguments import RecipesArguments
from .flags import wrap


def run(args: RecipesArguments) -> int:
    width = max(len(name) for family in FAMILIES for name in family.recipes) + 2
    for family in FAMILIES:
        print(f"{family.about}:")
        for name, about in family.recipes.items():
            line = f"  {name:<{width}}{about}"  # whole for grep
            print(wrap(line, " " * (width + 2)) if sys.stdout.isatty() else line)
    return 0
