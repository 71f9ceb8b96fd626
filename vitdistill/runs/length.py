"""How many steps a run has, and whether its settings were made for so many."""

from ..errors import ConfigError, Say, Set
from ..messages import plural
from ..recipes.config import Recipe

FEW_STEPS = 1000
"""Below this many steps, a recipe made for ImageNet falls short."""


def check_length(recipe: Recipe, num_images: int, steps_per_epoch: int, say: Say) -> None:
    """Say how many steps a run has, what an epoch leaves out, and what to set where that is poor.

    Raises:
        ConfigError: the moving average would mostly be the weights the run began with.
    """
    train, epochs = recipe.train, recipe.train.epochs
    if recipe.data.unlabelled is not None:  # some images are shown several times an epoch
        num_images = steps_per_epoch * train.batch_size
    steps, warmup = steps_per_epoch * epochs, steps_per_epoch * recipe.optim.warmup_epochs
    left_out = max(num_images - steps_per_epoch * train.batch_size, 0)
    rest = f"{left_out:,} of {num_images:,} images ({left_out / num_images:.0%})"
    length = f"{plural(steps, 'step')}, {steps_per_epoch:,} an epoch, {warmup:,.0f} of them warm-up"
    say(f"{length}; an epoch leaves out {rest}" if left_out else length)
    if steps < FEW_STEPS or left_out > num_images / 10:
        fitting = 1 << max((num_images * epochs // FEW_STEPS).bit_length() - 1, 4)
        size = min(fitting, max(train.batch_size // 2, 1))
        what = "that is a short run" if steps < FEW_STEPS else "that leaves many images out"
        what += f", and batches of {size} would make {num_images // size * epochs:,} steps"
        say(ConfigError(what, (Set("train.batch_size", size), Set("train.epochs"))))
    share = 0.0 if train.ema_decay is None else train.ema_decay**steps
    if share > 0.01:
        # Averaging over a tenth of the run leaves e^-10 of them.
        fix = Set("train.ema_decay", f"{1 - 10 / steps:.3g}" if steps > 20 else "none")
        what = f"the moving average of {steps:,} steps still holds {share:.0%} of its first weights"
        error = ConfigError(what, fix)
        if share > 0.5:
            raise error
        say(error)
