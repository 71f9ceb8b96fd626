"""What features are worth without training the network: k-nearest neighbours and a linear probe on
one vector an image.

Both read a network's features after the final norm. k-NN needs labels only to judge by, so it
follows a pre-training whose loss has none; the linear probe is what a classifier on frozen features
reaches.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from .. import keyed
from ..data.batch import Batch
from ..data.loader import EvalLoader
from ..data.sources.base import ImageSource
from ..errors import ConfigError, DataError, NonFiniteError, UserError
from ..vit.families import family_of
from ..vit.needs import Needs
from ..vit.output import ViTOutput
from ..vit.walk import run_vit
from ..world import World

Pool = Literal["mean", "class"]

K = 20
TEMPERATURE = 0.07
L2_GRID = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
"""Strengths of the linear probe's L2 penalty that are tried, the strongest first."""

_SIMILARITIES = 2**25  # of one chunk of queries: 128 MiB
_LOGITS = 2**24  # of one chunk of the linear probe: 64 MiB
# Cosines of float32 vectors nearer to each other than this are equal: duplicates are rounded.
_ROUNDING = 1e-6


def image_features(output: ViTOutput, pool: Pool = "mean") -> Float[Tensor, "B D"]:
    """One vector an image, float32, from the features after the final norm.

    ``mean`` averages the patches, prefix tokens left out: every network has it, and objectives on
    patches or pixels (MAE, feature distillation) train no class token. ``class`` takes the class
    token. Raises `ConfigError` where there is none.
    """
    assert output.features is not None
    check_pool(pool, output.has_class_token)
    return (
        output.features[:, 0].float()
        if pool == "class"
        else output.features[:, output.num_prefix_tokens :].float().mean(1)
    )


def check_pool(pool: Pool, has_class_token: bool) -> None:
    """Raises `ConfigError` for the class token of a network that has none."""
    if pool == "class" and not has_class_token:
        raise ConfigError(
            "the pool 'class' reads a class token, and this network has none: use the mean of its"
            " patches (--pool mean)"
        )


# --- a whole data set ----------------------------------------------------------------------------


class Stopped(Exception):
    """A process was asked to stop on the way; the same batch on every process."""


def batches_together(loader: EvalLoader, here: World, stop: Callable[[], bool]) -> Iterator[Batch]:
    """This process's batches, all processes meeting before each, also one that has a batch fewer.

    Raises:
        Stopped: ``stop`` said so to one of them.
        UserError: what one of them met, on every process.
    """
    batches = iter(loader)
    for _ in range(here.most(len(loader))):
        batch, failure = None, None
        try:
            batch = next(batches, None)
        except UserError as error:
            failure = error
        stopped, failed = here.any(stop(), failure is not None)
        if failed:
            here.agree(failure)
        if stopped:
            raise Stopped
        if batch is not None:
            yield batch


@torch.no_grad()
def extract(
    model: nn.Module,
    loader: EvalLoader,
    here: World,
    amp_dtype: torch.dtype | None = None,
    pool: Pool = "mean",
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Float[Tensor, "N D"], Int[Tensor, " N"]] | None:
    """Features (float32) and labels of every image of a loader, in sample order, on every process;
    None if ``stop`` said so.

    Each image comes once, whatever the number of processes. A transformer that normalises after the
    pool does so here too.

    Raises:
        ConfigError: ``pool`` is ``class`` and the network has no class token.
        NonFiniteError: a feature is NaN or infinite.
    """
    network = family_of(model).network
    check_pool(pool, network.has_class_token)  # before any process waits for another
    training = model.training
    model.eval()
    after_pool = getattr(model, "fc_norm", None)
    features: list[Tensor] = []
    labels: list[Tensor] = []
    try:
        for batch in batches_together(loader, here, stop):
            with torch.autocast(here.device.type, amp_dtype, enabled=amp_dtype is not None):
                output = run_vit(model, batch.images, Needs(features=True))
            pooled = image_features(output, pool)
            features.append(pooled if after_pool is None else after_pool(pooled))
            labels.append(batch.labels)
    except Stopped:
        return None
    finally:
        model.train(training)
    whole, known = _in_sample_order(features, labels, here)
    broken = int((~whole.isfinite().all(1)).sum())
    if broken:
        raise NonFiniteError(
            f"The features of {broken} of {len(whole)} images are NaN or infinite; check the"
            " weights and the precision."
        )
    return whole, known


def _in_sample_order(
    features: Sequence[Tensor], labels: Sequence[Tensor], here: World
) -> tuple[Tensor, Tensor]:
    """All processes' rows: process ``r`` of ``W`` has samples ``r``, ``r + W``, ..., so the last
    rounds may lack some.
    """
    width = here.most(features[0].shape[1] if features else 0)
    mine = torch.cat([*features, torch.empty(0, width, device=here.device)])
    known = torch.cat([*labels, torch.empty(0, dtype=torch.int64, device=here.device)])
    if here.size == 1:
        return mine, known
    counts = here.gather(len(mine))
    missing = max(counts) - len(mine)
    mine = torch.cat([mine, mine.new_zeros(missing, width)])
    known = torch.cat([known, known.new_zeros(missing)])
    rows, numbers = (
        [torch.empty_like(mine) for _ in counts],
        [torch.empty_like(known) for _ in counts],
    )
    dist.all_gather(rows, mine)
    dist.all_gather(numbers, known)
    return (
        torch.stack(rows, 1).flatten(0, 1)[: sum(counts)],
        torch.stack(numbers, 1).flatten(0, 1)[: sum(counts)],
    )


class _Part(ImageSource):
    """Some images of a source, in the order of their numbers there."""

    def __init__(self, source: ImageSource, ids: keyed.I64) -> None:
        self._source, self._ids = source, ids
        self.name, self.classes = source.name, source.classes
        self.labels, self.sizes = source.labels[ids], source.sizes[ids]

    def key(self, i: int) -> str:
        return self._source.key(int(self._ids[i]))

    def load(self, i: int) -> Image.Image:
        return self._source.load(int(self._ids[i]))

    def image_size(self, i: int) -> tuple[int, int]:
        return self._source.image_size(int(self._ids[i]))


def evenly(source: ImageSource, count: int) -> ImageSource:
    """At most ``count`` images, each class with its share (rounded down or up), always the same
    ones.

    The images are laid out class by class, shuffled within each, and taken at equal steps: so a
    class is never missed that holds one in ``count`` of the images, however the source is ordered.
    """
    size = len(source)
    if size <= count:
        return source
    shuffled = keyed.permutation(0, 0, size, keyed.Stream.SUBSET)
    by_class = shuffled[np.argsort(source.labels[shuffled], kind="stable")]
    return _Part(source, np.sort(by_class[np.arange(count, dtype=np.int64) * size // count]))


# --- k nearest neighbours ------------------------------------------------------------------------


def knn_votes(
    bank: Float[Tensor, "N D"],
    labels: Int[Tensor, " N"],
    queries: Float[Tensor, "Q D"],
    num_classes: int,
    k: int = K,
    temperature: float = TEMPERATURE,
) -> Float[Tensor, "Q {num_classes}"]:
    """The classes' votes among each query's ``k`` nearest images of the bank, float64; the nearest
    one weighs 1.

    votes_c = sum over the k nearest i of class c of exp((s_i - s_1) / T), s the cosine similarity.
    Images that are equally near at the k-th place share the places that are left, so the order of
    the bank does not matter.

    Raises:
        ConfigError: ``k`` is not between 1 and the size of the bank.
    Source: Wu et al. 2018 (instance discrimination), section 3.4, with T = 0.07; k = 20 as DINO
        (Caron et al. 2021) reports.
    """
    if k < 1:
        raise ConfigError(f"k-NN with k = {k} has no neighbours to ask: give 1 or more (--knn)")
    if k > len(bank):
        raise ConfigError(
            f"k-NN with k = {k} needs as many training images, and there are {len(bank)}: give at"
            " most that (--knn)"
        )
    similar = _unit(queries) @ _unit(bank).T
    top, index = similar.topk(k)
    weights = ((top - top[:, :1]).double() / temperature).exp()
    votes = weights.new_zeros(len(queries), num_classes).scatter_add_(1, labels[index], weights)
    tied = (similar >= top[:, -1:] - _ROUNDING).sum(1) > k
    if bool(tied.any()):
        nearest, last, rows = top[tied, :1], top[tied, -1:], similar[tied]
        above = rows > last + _ROUNDING
        at = ~above & (rows >= last - _ROUNDING)
        places = above + at * ((k - above.sum(1, keepdim=True)) / at.sum(1, keepdim=True)).double()
        shared = places * ((rows - nearest).double() / temperature).exp()
        votes[tied] = shared.new_zeros(len(rows), num_classes).index_add_(1, labels, shared)
    return votes


def knn_accuracy(
    train_features: Float[Tensor, "N D"],
    train_labels: Int[Tensor, " N"],
    val_features: Float[Tensor, "Q D"],
    val_labels: Int[Tensor, " Q"],
    k: int = K,
    temperature: float = TEMPERATURE,
) -> dict[str, float]:
    """``knn_top1``, and with more than 5 classes ``knn_top5``, of `knn_votes`: fractions of the
    labelled validation images.

    Equal votes go to the lower class; a class without a vote is never right. Images of label -1 are
    left out. Memory is bounded: a chunk of queries at a time.

    Raises:
        ConfigError: ``k`` is not between 1 and the number of labelled training images.
        DataError: no validation image, or no training image, has a label.
    """
    bank, labels = _labelled(train_features, train_labels, "training")
    queries, truth = _labelled(val_features, val_labels, "validation")
    num_classes = int(max(labels.max(), truth.max())) + 1
    right = torch.zeros(2, dtype=torch.int64, device=bank.device)
    rows = max(_SIMILARITIES // max(len(bank), num_classes), 1)
    for some, own_class in zip(queries.split(rows), truth.split(rows), strict=True):
        votes = knn_votes(bank, labels, some, num_classes, k, temperature)
        own = votes.gather(1, own_class[:, None])
        earlier = torch.arange(num_classes, device=votes.device) < own_class[:, None]
        rank = ((votes > own) | (votes == own) & earlier).sum(1)
        voted = own[:, 0] > 0
        right += torch.stack([(voted & (rank == 0)).sum(), (voted & (rank < 5)).sum()])
    top1, top5 = (right.double() / len(truth)).tolist()
    return {"knn_top1": top1, "knn_top5": top5} if num_classes > 5 else {"knn_top1": top1}


def _unit(features: Tensor) -> Tensor:
    """Rows of length 1, also of numbers whose squares would overflow; a row of zeros stays one."""
    features = features.float()
    largest = features.abs().amax(1, keepdim=True)
    return nn.functional.normalize(features / torch.where(largest > 0, largest, 1), dim=1)


def _labelled(features: Tensor, labels: Tensor, split: str) -> tuple[Tensor, Tensor]:
    known = labels >= 0
    if not bool(known.any()):
        raise DataError(
            f"No {split} image has a label, and features are judged by labels; put the images into"
            " one folder a class."
        )
    return features[known], labels[known]


def knn_evaluation(
    model: nn.Module,
    bank: EvalLoader,
    queries: EvalLoader,
    here: World,
    amp_dtype: torch.dtype | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """``num_samples`` and `knn_accuracy` of a network's mean features, with `K` neighbours or the
    whole of a smaller bank.

    None if ``stop`` said so to one process on the way.
    """
    train = extract(model, bank, here, amp_dtype, stop=stop)
    val = None if train is None else extract(model, queries, here, amp_dtype, stop=stop)
    if train is None or val is None:
        return None
    k = min(K, int((train[1] >= 0).sum()))
    return {"num_samples": float(len(val[1])), **knn_accuracy(*train, *val, k=k)}


# --- linear probe --------------------------------------------------------------------------------


def linear_probe(
    train_features: Float[Tensor, "N D"],
    train_labels: Int[Tensor, " N"],
    val_features: Float[Tensor, "Q D"],
    val_labels: Int[Tensor, " Q"],
) -> dict[str, float]:
    """``linear_top1``: the accuracy of multinomial logistic regression on frozen features;
    ``linear_l2``: its chosen penalty.

    Features are standardised with the training images' mean and deviation. The L2 penalty is the
    one of `L2_GRID` that is right most often on a held-out tenth of the training images (every
    tenth, class by class; equals go to the stronger); the regression is then fitted to all of them.
    Nothing is drawn at random, and the validation images choose nothing. Images of label -1 are
    left out.

    Raises:
        DataError: no validation image has a label, or fewer than ten training images.
    """
    features, labels = _labelled(train_features, train_labels, "training")
    queries, truth = _labelled(val_features, val_labels, "validation")
    if len(features) < 10:
        raise DataError(
            "The linear probe needs 10 or more labelled training images, a tenth of them to choose"
            f" its L2 penalty by, and there are {len(features)}."
        )
    num_classes = int(max(labels.max(), truth.max())) + 1
    features, queries = features.float(), queries.float()
    deviation, mean = torch.std_mean(features, 0, correction=0)
    # What is constant but for rounding says nothing.
    stretch = torch.where(deviation > 1e-6 * features.abs().amax(0), 1 / deviation, 0)
    features, queries = (features - mean) * stretch, (queries - mean) * stretch
    held_out = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    held_out[labels.argsort(stable=True)[4::10]] = True
    fitted: tuple[Tensor, Tensor] | None = None
    best, chosen, start = -1, L2_GRID[0], None
    for l2 in L2_GRID:
        fitted = fit_logistic(features[~held_out], labels[~held_out], num_classes, l2, fitted)
        right = int((_answers(features[held_out], fitted) == labels[held_out]).sum())
        if right > best:
            best, chosen, start = right, l2, fitted
    fitted = fit_logistic(features, labels, num_classes, chosen, start)
    right = int((_answers(queries, fitted) == truth).sum())
    return {"linear_top1": right / len(truth), "linear_l2": chosen}


def fit_logistic(
    features: Float[Tensor, "N D"],
    labels: Int[Tensor, " N"],
    num_classes: int,
    l2: float,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Float[Tensor, "D C"], Float[Tensor, " C"]]:
    """Weight and bias that minimise mean cross-entropy + l2 / 2 |weight|^2, by L-BFGS on all images
    at once.

    ``start`` is where to begin, None at zero. At most 200 iterations; the gradient is summed a
    chunk of images at a time.
    """
    count, dim = features.shape
    weight = features.new_zeros(dim, num_classes) if start is None else start[0].clone()
    bias = features.new_zeros(num_classes) if start is None else start[1].clone()
    rows = max(_LOGITS // num_classes, 1)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=200,
        history_size=20,
        tolerance_grad=1e-6,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def objective() -> float:
        weight.grad, bias.grad = weight * l2, torch.zeros_like(bias)
        loss = 0.5 * l2 * weight.double().square().sum()
        for some, truth in zip(features.split(rows), labels.split(rows), strict=True):
            log_probs = torch.addmm(bias, some, weight).log_softmax(1)
            loss = loss - log_probs.gather(1, truth[:, None]).double().sum() / count
            slope = log_probs.exp() / count
            slope.scatter_add_(1, truth[:, None], slope.new_full((len(truth), 1), -1 / count))
            weight.grad += some.T @ slope
            bias.grad += slope.sum(0)
        return float(loss)

    optimizer.step(objective)
    return weight, bias


def _answers(features: Tensor, fitted: tuple[Tensor, Tensor]) -> Tensor:
    return torch.addmm(fitted[1], features, fitted[0]).argmax(1)
