"""Every other network (CNNs, hierarchical transformers, a user's own): logits and feature maps of
whole images.
"""

from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import ConfigError
from .family import BlockRun, Family


def _as_map(
    final: object, last: Float[Tensor, "B D rows columns"], channels_last: bool
) -> Float[Tensor, "B D rows columns"]:
    """What `forward_features` gives, as a map: the last stage's after the final norm. The last
    stage's itself where that is no such map.

    timm's networks give it with channels first or last, or as tokens behind their prefix tokens;
    ``channels_last``: for shapes that do not tell.
    """
    if not isinstance(final, Tensor):
        return last
    rows, columns = last.shape[2:]
    if final.ndim == 3 and final.shape[2] == last.shape[1] and final.shape[1] >= rows * columns:
        return (
            final[:, final.shape[1] - rows * columns :]
            .transpose(1, 2)
            .unflatten(2, (rows, columns))
        )
    moved = final.movedim(-1, 1)
    if moved.shape == last.shape and (final.shape != last.shape or channels_last):
        return moved
    return final if final.shape == last.shape else last


class WholeImage(Family):
    """A network that is run by its own ``forward``: no patch subsets, no attention; its "blocks"
    are its feature stages.

    Feature maps come from timm's ``forward_intermediates``; their width and grid may differ from
    stage to stage.
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
        if not hidden and not features:
            answer = self.model(images)
            if isinstance(
                answer, tuple
            ):  # distilled CNN-ViT hybrids in training: one answer a head
                answer = sum(answer) / len(answer)
            return answer, {}, None
        forward = getattr(self.model, "forward_intermediates", None)
        if forward is None:
            raise ConfigError(
                f"{type(self.model).__name__} has no forward_intermediates: hidden states cannot be"
                " recorded"
            )
        last = self.depth - 1
        stages = sorted(hidden | {last} if features else hidden)
        if logits or features:
            final, found = forward(images, indices=stages)
        else:
            final, found = None, forward(images, indices=stages, intermediates_only=True)
        maps = dict(zip(stages, found, strict=True))
        answer = self.model.forward_head(final) if logits else None  # type: ignore[operator]
        channels_last = getattr(self.model, "output_fmt", None) == "NHWC"
        return (
            answer,
            {i: maps[i] for i in hidden},
            _as_map(final, maps[last], channels_last) if features else None,
        )

    def embed(self, images: Float[Tensor, "B c h w"], keep: Int[Tensor, "B K"] | None) -> Tensor:
        raise AssertionError("a network that does not walk is run whole")

    def run_block(
        self, i: int, tokens: Tensor, rows: int | None, attention: bool = False, qkv: bool = False
    ) -> BlockRun:
        raise AssertionError("a network that does not walk is run whole")

    def norm(self, tokens: Tensor) -> Tensor:
        raise AssertionError("a network that does not walk is run whole")

    def head(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        raise AssertionError("a network that does not walk is run whole")
