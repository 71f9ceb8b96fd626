"""``vitdistill explain``."""

from contextlib import suppress
from pathlib import Path

from ..errors import UserError
from ..explain.ahead import forecast
from ..explain.measure import measure_step, shares_ahead
from ..messages import format_count, format_table
from ..recipes.config import Recipe
from ..recipes.stages import Stages, in_stage, sources
from ..recipes.yaml import dump_recipe
from ..runs.folder import check_folder, saved_recipe
from ..runs.identity import SUMMARY, has_learnt
from ..runs.stored import with_views_of_labels
from .arguments import ExplainArguments
from .console import say
from .recipe import resolve_recipe
from .render import teller


def run(args: ExplainArguments) -> int:
    """Print the plan and its cost; nothing is trained and nothing is written."""
    recipe = resolve_recipe(args)
    if args.recipe_yaml and args.time:
        raise UserError("--recipe-yaml prints the recipe and --time measures a step: give one")
    if args.device is not None and not args.time:
        raise UserError("--device cannot take effect: only --time runs anything on a device")
    if args.recipe_yaml:
        print(dump_recipe(recipe), end="")
        return 0
    stages = recipe.stages if isinstance(recipe, Stages) else {"": recipe}
    if args.output is not None:
        for key, stage in stages.items():
            with in_stage(key):
                state = _state(stage, Path(args.output, stage.name if key else ""))
                say(f"{Path(args.output)}{f', stage {key}' if key else ''}: {state}")
        say("")
    runs = forecast(recipe)
    if not all(stage.data.dir for stage in stages.values()):
        say("no --data-dir is given: counting ImageNet-1k's 1,281,167 images, 1,000 classes\n")
    for number, (key, run) in enumerate(runs.items(), 1):
        if key:
            named = sources(stages[key]).items()
            begun = [f"{path.split('.')[-2]} from {source}" for path, source in named]
            heading = f"Stage {number} of {len(runs)}: " + ", ".join([key, *begun])
            say(f"{heading}\n{'=' * len(heading)}\n")
        say(run.text)
        if args.time:
            device = args.device or "auto"
            measured = measure_step(run, device)
            say(f"\n{measured}", fold=True)
            with suppress(UserError):  # images or weights may not be there yet
                for line in shares_ahead(run.recipe, device):
                    teller(args)(line)
        if key:
            say("")
    if len(runs) > 1:
        rows = [(key, str(r.recipe.train.epochs), format_count(r.flops)) for key, r in runs.items()]
        total = ("together", "", format_count(sum(run.flops for run in runs.values())))
        say("\n".join(format_table([("all stages", "epochs", "FLOPs"), *rows, total])))
    return 0


def _state(recipe: Recipe, folder: Path) -> str:
    """Return what training into this folder would be; raise what would be refused."""
    if not sources(recipe):  # a stage that begins with another one finds out when that is done
        recipe = with_views_of_labels(recipe, saved_recipe(folder))
        check_folder(folder, recipe)
    if (folder / SUMMARY).is_file():
        return "the run is finished, nothing would be done"
    return "the run would be resumed" if has_learnt(folder) else "the run would begin"
