"""``vitdistill recipes``: the named recipes, known without torch."""

from ..recipes import FAMILIES
from .arguments import RecipesArguments


def run(args: RecipesArguments) -> int:
    """Print every named recipe with its description."""
    width = max(len(name) for family in FAMILIES for name in family.recipes) + 2
    for family in FAMILIES:
        also = "".join(f" (and NAME:{variant})" for variant in family.variants)
        print(f"{family.about}{also}:")
        for name, about in family.recipes.items():
            print(f"  {name:<{width}}{about}")
    return 0
