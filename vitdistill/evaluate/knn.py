"""k nearest neighbours on one vector an image.

Labels are needed only for judging, so k-NN can follow pre-training whose loss uses none.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..data.loader import EvalLoader
from ..errors import ConfigError, Give
from ..messages import plural
from ..world import World
from .features import extract, labelled

K = 20
TEMPERATURE = 0.07

_SIMILARITIES = 2**25  # of one chunk of queries: 128 MiB
# Float32 cosines closer than this count as equal: those of duplicates differ by rounding.
_ROUNDING = 1e-6


def knn_votes(
    bank: Float[Tensor, "N D"],
    labels: Int[Tensor, " N"],
    queries: Float[Tensor, "Q D"],
    num_classes: int,
    k: int = K,
    temperature: float = TEMPERATURE,
) -> Float[Tensor, "Q {num_classes}"]:
    """Count the classes' votes among each query's ``k`` nearest images of the bank, in float64.

    votes_c = sum over the k nearest i of class c of exp((s_i - s_1) / T), s the cosine similarity.
    Images that are equally near at the k-th place share the places that are left, so the order of
    the bank does not matter. Raises `ConfigError` unless ``k`` is from 1 to the bank's size.

    Source: Wu et al. 2018 (instance discrimination), section 3.4, with T = 0.07; k = 20 as DINO
        (Caron et al. 2021) reports.
    """
    if not 1 <= k <= len(bank):
        what = f"k-NN takes 1 to {plural(len(bank), 'training image')}, not {k}"
        raise ConfigError(what, Give("knn"))
    similar = F.normalize(queries.float(), dim=1) @ F.normalize(bank.float(), dim=1).T
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
    """Return ``knn_top1``, and with more than 5 classes ``knn_top5``, of `knn_votes`.

    Equal votes go to the lower class; a class without a vote is never right. Images of label -1 are
    left out; raises `DataError` if no others are left.
    """
    bank, labels = labelled(train_features, train_labels, "training")
    queries, truth = labelled(val_features, val_labels, "validation")
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


def knn_evaluation(
    model: nn.Module,
    bank: EvalLoader,
    queries: EvalLoader,
    world: World,
    amp_dtype: torch.dtype | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Return ``num_samples`` and `knn_accuracy` of a network's mean features.

    `K` neighbours are asked, or the whole of a smaller bank. Raises as `extract`.
    """
    train, val = (extract(model, loader, world, amp_dtype, stop=stop) for loader in (bank, queries))
    k = min(K, int((train[1] >= 0).sum()))
    return {"num_samples": float(len(val[1])), **knn_accuracy(*train, *val, k=k)}
