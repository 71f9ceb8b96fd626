"""One vector an image: the features that k-NN and the linear probe judge a network by."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..data.batch import Batch
from ..data.loader import EvalLoader
from ..errors import ConfigError, DataError, Give, NonFiniteError, UserError
from ..vit.needs import Needs
from ..vit.output import ViTOutput
from ..vit.walk import run_vit
from ..world import World

Pool = Literal["mean", "class"]


def image_features(output: ViTOutput, pool: Pool = "mean") -> Float[Tensor, "B D"]:
    """Pool the features after the final norm into one float32 vector an image.

    ``mean`` averages the patches without prefix tokens: every network has them, and objectives on
    patches or pixels (MAE, feature distillation) train no class token. ``class`` takes the class
    token.
    """
    assert output.features is not None
    check_pool(pool, output.has_class_token)
    if pool == "class":
        return output.features[:, 0].float()
    return output.features[:, output.num_prefix_tokens :].float().mean(1)


def check_pool(pool: Pool, has_class_token: bool) -> None:
    """Raise `ConfigError` for the class token of a network that has none."""
    if pool == "class" and not has_class_token:
        raise ConfigError("the network has no class token that can be read", Give("pool", "mean"))


class Stopped(Exception):
    """A process was asked to stop; raised at the same batch on every process."""


def batches_together(loader: EvalLoader, world: World, stop: Callable[[], bool]) -> Iterator[Batch]:
    """Yield this process's batches; all processes meet before each, even one that has run out.

    Raises:
        Stopped: ``stop`` returned true on one of them.
        UserError: one of them met it; raised on every process.
    """
    batches = iter(loader)
    for _ in range(max(world.gather(len(loader)))):
        batch, failure = None, None
        try:
            batch = next(batches, None)
        except UserError as error:
            failure = error
        stopped, failed = world.any(stop(), failure is not None)
        if failed:
            world.agree(failure)
        if stopped:
            raise Stopped
        if batch is not None:
            yield batch


@torch.no_grad()
def extract(
    model: nn.Module,
    loader: EvalLoader,
    world: World,
    amp_dtype: torch.dtype | None = None,
    pool: Pool = "mean",
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Float[Tensor, "N D"], Int[Tensor, " N"]]:
    """Return features (float32) and labels of a loader's images in sample order, on every process.

    Each image comes once, whatever the number of processes. A network that norms after its pooling
    (timm's ``fc_norm``) does so here too.

    Raises:
        Stopped: as `batches_together`.
        ConfigError: ``pool`` is ``class`` and the network has no class token.
        NonFiniteError: a feature is NaN or infinite.
    """
    training = model.training
    model.eval()
    after_pool = getattr(model, "fc_norm", None)
    features: list[Tensor] = []
    labels: list[Tensor] = []
    try:
        for batch in batches_together(loader, world, stop):
            with world.autocast(amp_dtype):
                output = run_vit(model, batch.images, Needs(features=True))
            pooled = image_features(output, pool)
            features.append(pooled if after_pool is None else after_pool(pooled))
            labels.append(batch.labels)
    finally:
        model.train(training)
    whole, known = _in_sample_order(features, labels, world)
    broken = int((~whole.isfinite().all(1)).sum())
    if broken:
        raise NonFiniteError(
            f"the features of {broken} of {len(whole)} images are NaN or infinite",
            "check the weights and the precision",
        )
    return whole, known


def _in_sample_order(
    features: Sequence[Tensor], labels: Sequence[Tensor], world: World
) -> tuple[Tensor, Tensor]:
    """Gather the rows of all processes: process ``r`` of ``W`` has samples ``r``, ``r + W``, ..."""
    width = max(world.gather(features[0].shape[1] if features else 0))
    rows = torch.cat([*features, torch.empty(0, width, device=world.device)])
    known = torch.cat([*labels, torch.empty(0, dtype=torch.int64, device=world.device)])
    if world.size == 1:
        return rows, known
    parts = world.gather((rows.cpu(), known.cpu()))
    count = sum(len(truth) for _, truth in parts)
    rows, known = rows.new_empty(count, width), known.new_empty(count)
    for rank, (some, truth) in enumerate(parts):
        rows[rank :: world.size] = some.to(rows)
        known[rank :: world.size] = truth.to(known)
    return rows, known


def labelled(features: Tensor, labels: Tensor, split: str) -> tuple[Tensor, Tensor]:
    """Leave out images without a label (-1); raise `DataError` if there is no other."""
    known = labels >= 0
    if not bool(known.any()):
        raise DataError(
            f"no {split} image has a label to judge features by",
            "put the images into one folder a class",
            field="data.dir",
        )
    return features[known], labels[known]
