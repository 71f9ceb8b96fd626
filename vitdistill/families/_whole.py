"""Every other network (CNNs, hierarchical transformers, a user's own): logits and feature maps of whole images."""

import inspect
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import ConfigError
from ._base import BlockRun, Family


class WholeImage(Family):
    """A network that is run by its own ``forward``: no patch subsets, no attention; its "blocks" are its feature stages.

    Feature maps come from timm's ``forward_intermediates``; their width and grid may differ from stage to stage.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.depth = max(len(getattr(model, "feature_info", ())), 1)
        self.dim = int(getattr(model, "num_features", 0))
        if hasattr(model, "forward_intermediates"):
            self.dims = tuple(int(stage["num_chs"]) for stage in getattr(model, "feature_info", ()))

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        return True

    def grid(self, images: Tensor) -> tuple[int, int]:
        return (0, 0)

    def run_whole(
        self, images: Tensor, logits: bool, hidden: frozenset[int], features: bool
    ) -> tuple[Tensor | None, dict[int, Tensor], Tensor | None]:
        answer: Any = None
        maps: dict[int, Tensor] = {}
        last: Tensor | None = None
        if features:
            try:
                answer, (last,) = self._forward(images, logits, [self.depth - 1], norm=True)
            except AssertionError:  # timm's Hiera, whose final norm is after its pool: there the map is what it has
                answer, (last,) = self._forward(images, logits, [self.depth - 1])
        stages = sorted(hidden)
        if hidden:
            given, found = self._forward(images, logits and not features, stages)
            answer, maps = answer if features else given, dict(zip(stages, found, strict=True))
        elif logits and not features:
            answer = self.model(images)
            if isinstance(answer, tuple):  # distilled CNN-ViT hybrids in training: one answer a head
                answer = sum(answer) / len(answer)
        return answer, maps, last

    def _forward(self, images: Tensor, logits: bool, stages: list[int], norm: bool = False) -> tuple[Tensor | None, list[Tensor]]:
        """The prediction, if it is asked for, and the maps of these stages, after the final norm if told so."""
        forward = getattr(self.model, "forward_intermediates", None)
        if forward is None:
            raise ConfigError(f"{type(self.model).__name__} has no forward_intermediates: hidden states cannot be recorded")
        options = {"norm": True} if norm and "norm" in inspect.signature(forward).parameters else {}
        if not logits:
            return None, forward(images, indices=stages, intermediates_only=True, **options)
        final, maps = forward(images, indices=stages, **options)
        return self.model.forward_head(final), maps  # type: ignore[operator]

    def embed(self, images: Float[Tensor, "B c h w"], keep: Int[Tensor, "B K"] | None) -> Tensor:
        raise AssertionError("a network that does not walk is run whole")

    def run_block(self, i: int, tokens: Tensor, rows: int | None, attention: bool = False, qkv: bool = False) -> BlockRun:
        raise AssertionError("a network that does not walk is run whole")

    def norm(self, tokens: Tensor) -> Tensor:
        raise AssertionError("a network that does not walk is run whole")

    def head(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        raise AssertionError("a network that does not walk is run whole")
