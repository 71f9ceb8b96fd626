"""How many steps a run has, and whether its settings were made for so many."""

from collections.abc import Callable

from ..errors import ConfigError, Set
from ..messages import plural
from ..recipes.config import Recipe

FEW_STEPS = 1000
"""Steps below which a recipe made for ImageNet does not get where it should."""


def check_length(
    recipe: Recipe, num_images: int, an_epoch: int, say: Callable[[str], None]
) -> None:
    """Say how many steps a run has, what an epoch leaves out, and what to set where that is poor.

    ``an_epoch``: steps an epoch.

    Raises:
        ConfigError: the moving average would mostly be the weights the run began with.
    """
    train, epochs = recipe.train, recipe.train.epochs
    steps, warmup = an_epoch * epochs, an_epoch * recipe.optim.warmup_epochs
    left_out = max(num_images - an_epoch * train.batch_size, 0)
    say(
        f"{plural(steps, 'step')}, {an_epoch:,} an epoch, {warmup:,.0f} of them warm-up;"
        f" an epoch leaves out {left_out:,} of {num_images:,} images ({left_out / num_images:.0%})"
    )
    if steps < FEW_STEPS or left_out > num_images / 10:
        fitting = 1 << max((num_images * epochs // FEW_STEPS).bit_length() - 1, 4)
        size = min(fitting, max(train.batch_size // 2, 1))
        rate = recipe.optim.lr * size / train.batch_size
        say(
            f"that is little: train.batch_size={size} with optim.lr={rate:.2g} in proportion makes"
            f" {num_images // size * epochs:,} steps, and more train.epochs more"
        )
    if train.ema_decay is not None:
        _check_average(train.ema_decay, steps, say)


def _check_average(decay: float, steps: int, say: Callable[[str], None]) -> None:
    share = decay**steps
    what = (
        f"the moving average remembers {1 / (1 - decay):,.0f} steps and the run has {steps:,}, so"
        f" that {share:.0%} of it are the weights it began with"
    )
    # A memory of a tenth of the run leaves e^-10 of them.
    fitting = f"{1 - 10 / steps:.3g}" if steps > 20 else "none"
    if share > 0.5:
        raise ConfigError(what, Set("train.ema_decay", fitting), field="train.ema_decay")
    if share > 0.01:
        say(f"{what}: train.ema_decay={fitting} leaves none of them")
