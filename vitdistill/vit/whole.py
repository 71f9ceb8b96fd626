"""Networks that are run whole: CNNs, hierarchical transformers, a user's own."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError
from .needs import Needs
from .network import Network
from .output import ViTOutput


class Whole:
    """A network run by its own ``forward``: no patch subsets, no attention.

    Its "blocks" are its feature stages, whose maps come from timm's ``forward_intermediates``;
    width and grid may differ from stage to stage.

    Attributes:
        network: the description of the model.
    """

    def __init__(self, model: nn.Module) -> None:
        stages = getattr(model, "feature_info", ())
        recorded = stages if hasattr(model, "forward_intermediates") else ()
        self.model = model
        self.network = Network(
            depth=max(len(stages), 1),
            dim=int(getattr(model, "num_features", 0)),
            dims=tuple(int(stage["num_chs"]) for stage in recorded),
            num_classes=int(getattr(model, "num_classes", 0)),
            answering=("class",),
            final_norm=not isinstance(getattr(model, "norm", None), nn.Identity),
        )

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Return (0, 0): there are no patches."""
        return (0, 0)

    def run(self, images: Float[Tensor, "B c h w"], needs: Needs) -> ViTOutput:
        """Run the model on whole images, and record what the resolved ``needs`` ask for.

        Raises:
            ConfigError: it has no attention to record, or no feature maps; or it cannot run on the
                meta device, where costs are counted, for it reads what its tensors hold.
        """
        try:
            return self._run(images, needs)
        except RuntimeError as error:
            if not images.is_meta:
                raise
            what = f"the cost of what is read of a {type(self.model).__name__} cannot be counted"
            raise ConfigError(f"{what} ({error})") from error

    def _run(self, images: Float[Tensor, "B c h w"], needs: Needs) -> ViTOutput:
        kind = type(self.model).__name__
        if needs.attention or needs.qkv:
            raise ConfigError(f"{kind} is not a plain ViT and has no attention to record")
        if not needs.hidden and not needs.features:
            answer = self.model(images)
            if isinstance(answer, tuple):  # a distilled hybrid in training: one answer a head
                answer = sum(answer) / len(answer)
            return ViTOutput(logits=answer, network=self.network)
        forward = getattr(self.model, "forward_intermediates", None)
        if forward is None:
            raise ConfigError(f"{kind} has no forward_intermediates, and no states to record")
        last = self.network.depth - 1
        stages = sorted(needs.hidden | {last} if needs.features else needs.hidden)
        final = None
        if needs.logits or needs.features:
            final, found = forward(images, indices=stages)
        else:
            found = forward(images, indices=stages, intermediates_only=True)
        maps = dict(zip(stages, found, strict=True))
        hidden = {i: maps[i] for i in needs.hidden}
        grids = {i: _size(stage) for i, stage in hidden.items()}
        features = None
        if needs.features:
            features = _as_map(final, maps[last], getattr(self.model, "output_fmt", "") == "NHWC")
            grids[last] = _size(features)
        return ViTOutput(
            logits=self.model.forward_head(final) if needs.logits else None,  # type: ignore[operator]
            hidden={i: _as_tokens(stage) for i, stage in hidden.items()},
            features=None if features is None else _as_tokens(features),
            grids=grids,
            network=self.network,
        )


def _size(stage: Tensor) -> tuple[int, int]:
    return int(stage.shape[2]), int(stage.shape[3])


def _as_tokens(stage: Float[Tensor, "B D rows columns"]) -> Float[Tensor, "B L D"]:
    return stage.flatten(2).transpose(1, 2)


def _as_map(
    final: Any, last: Float[Tensor, "B D rows columns"], channels_last: bool
) -> Float[Tensor, "B D rows columns"]:
    """Return the output of ``forward_features`` as a map, or ``last`` if it is none."""
    if not isinstance(final, Tensor):
        return last
    rows, columns = last.shape[2:]
    if final.ndim == 3 and final.shape[2] == last.shape[1] and final.shape[1] >= rows * columns:
        # Tokens, behind prefix tokens.
        final = final[:, final.shape[1] - rows * columns :].unflatten(1, (rows, columns))
        channels_last = True
    if final.ndim == 4 and channels_last:
        final = final.movedim(-1, 1)
    return final if final.shape == last.shape else last
