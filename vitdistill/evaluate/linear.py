"""A linear probe: what a classifier on frozen features reaches."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .features import labelled

L2_GRID = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
"""Strengths of the L2 penalty that are tried, the strongest first."""

_LOGITS = 2**24  # of one chunk: 64 MiB


def linear_probe(
    train_features: Float[Tensor, "N D"],
    train_labels: Int[Tensor, " N"],
    val_features: Float[Tensor, "Q D"],
    val_labels: Int[Tensor, " Q"],
) -> dict[str, float]:
    """Return ``linear_top1`` and ``linear_l2`` of logistic regression on standardised features.

    The L2 penalty is the one of `L2_GRID` that is right most often on a held-out tenth of the
    training images (every tenth, class by class; equals go to the stronger); the regression is then
    fitted to all of them. Nothing is drawn at random. Images of label -1 are left out; raises
    `DataError` if no others are left.
    """
    features, labels = labelled(train_features, train_labels, "training")
    queries, truth = labelled(val_features, val_labels, "validation")
    num_classes = int(max(labels.max(), truth.max())) + 1
    features, queries = features.float(), queries.float()
    deviation, mean = torch.std_mean(features, 0, correction=0)
    # A feature that is constant but for rounding says nothing, and would be blown up.
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
    """Minimise mean cross-entropy + l2 / 2 |weight|^2 by L-BFGS; return weight and bias.

    ``start``: where to begin; None: at zero. At most 200 iterations; the gradient is summed a chunk
    of images at a time.
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
