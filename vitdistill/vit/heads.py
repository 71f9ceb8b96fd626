"""Classifier heads that read several tokens."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError, Set


class TokenHeads(nn.Module):
    """The classifier of a student with several tokens: a linear map for each.

    It is the ``head`` of a timm `VisionTransformer` that does not pool (``global_pool=""``), and
    reads the class token and those of T teachers, which follow it.

    Args:
        dim: width of the tokens.
        num_classes: at least 1.
        names: of the T teachers, in the order of their tokens.
        prediction: ``mean``: the mean of all heads' logits; ``class``: the class token's; or a
            weight for each head, class token first, not negative, to be divided by their sum.

    Attributes:
        names: of the heads, "class" first.
        answering: the heads that the prediction is made of.

    Source: ``models.py::DistilledVisionTransformer.forward`` of OliverRensu/co-advise@8049918: the
    mean of logits, not of probabilities.
    """

    weights: Tensor

    def __init__(
        self,
        dim: int,
        num_classes: int,
        names: Sequence[str],
        prediction: str | Sequence[float] = "mean",
    ) -> None:
        super().__init__()
        self.names = ("class", *teacher_names(names))
        self.prediction = prediction
        self.linears = nn.ModuleList(nn.Linear(dim, num_classes) for _ in self.names)
        for linear in self.linears:
            nn.init.trunc_normal_(linear.weight, std=0.02)  # type: ignore[arg-type]
            nn.init.zeros_(linear.bias)  # type: ignore[arg-type]
        weights = _prediction_weights(prediction, len(self.names))
        self.answering = tuple(
            name for name, weight in zip(self.names, weights, strict=True) if weight
        )
        self.register_buffer("weights", torch.tensor(weights), persistent=False)

    def logits(self, tokens: Float[Tensor, "B L D"]) -> Float[Tensor, "B heads C"]:
        return torch.stack([linear(tokens[:, i]) for i, linear in enumerate(self.linears)], dim=1)

    def predict(self, logits: Float[Tensor, "B heads C"]) -> Float[Tensor, "B C"]:
        if self.prediction == "class":
            return logits[:, 0]
        if self.prediction == "mean":
            return logits.mean(1)
        return (logits * self.weights.to(logits.dtype)[:, None]).sum(1)

    def forward(self, tokens: Float[Tensor, "B L D"]) -> Float[Tensor, "B C"]:
        return self.predict(self.logits(tokens))


def teacher_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names as a tuple; raise `ConfigError` unless distinct, free identifiers."""
    given = () if isinstance(names, str) else tuple(names)
    free = {name for name in given if name.isidentifier()} - {"class", "all", "auto"}
    if not given or len(free) < len(given):
        what = f"the teachers of an advised student are {names!r}"
        fix = "give distinct names of letters, digits and underscores, but not class, all or auto"
        raise ConfigError(what, fix, field="student.model_args.teachers")
    return given


def _prediction_weights(prediction: str | Sequence[float], count: int) -> list[float]:
    if prediction == "mean":
        return [1 / count] * count
    if prediction == "class":
        return [1.0] + [0.0] * (count - 1)
    weights = () if isinstance(prediction, str) else prediction
    usable = all(0 <= weight < math.inf for weight in weights) and sum(weights) > 0
    if usable and len(weights) == count:
        return [weight / sum(weights) for weight in weights]
    field = "student.model_args.prediction"
    what = f"the prediction of an advised student is {prediction!r}"
    fixes = Set(field, "mean"), Set(field, "class"), f"give {count} weights, none negative"
    raise ConfigError(what, fixes, field=field)
