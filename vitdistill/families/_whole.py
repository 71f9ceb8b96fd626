"""Every other network (CNNs, hierarchical transformers, a user's own): logits and feature maps of whole images."""

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

    def run_whole(self, images: Tensor, logits: bool, hidden: frozenset[int]) -> tuple[Tensor | None, dict[int, Tensor]]:
        if not hidden:
            answer = self.model(images)
            if isinstance(answer, tuple):  # distilled CNN-ViT hybrids in training: one answer a head
                answer = sum(answer) / len(answer)
            return answer, {}
        forward = getattr(self.model, "forward_intermediates", None)
        if forward is None:
            raise ConfigError(f"{type(self.model).__name__} has no forward_intermediates: hidden states cannot be recorded")
        stages = sorted(hidden)
        if logits:
            final, maps = forward(images, indices=stages)
            answer = self.model.forward_head(final)  # type: ignore[operator]
        else:
            answer, maps = None, forward(images, indices=stages, intermediates_only=True)
        return answer, dict(zip(stages, maps, strict=True))

    def embed(self, images: Float[Tensor, "B c h w"], keep: Int[Tensor, "B K"] | None) -> Tensor:
        raise AssertionError("a network that does not walk is run whole")

    def run_block(self, i: int, tokens: Tensor, rows: int | None, attention: bool = False, qkv: bool = False) -> BlockRun:
        raise AssertionError("a network that does not walk is run whole")

    def norm(self, tokens: Tensor) -> Tensor:
        raise AssertionError("a network that does not walk is run whole")

    def head(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        raise AssertionError("a network that does not walk is run whole")
