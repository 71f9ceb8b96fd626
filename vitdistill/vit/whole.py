"""Networks that are run whole: CNNs, hierarchical transformers, a user's own."""

import inspect
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError
from .needs import Needs
from .network import Network
from .output import ViTOutput


class Whole:
    """A network run by its own ``forward``: no patch subsets, no attention.

    Its "blocks" are its feature stages, whose maps come from timm's ``forward_intermediates``;
    width and grid may differ from stage to stage. Prefix tokens are recorded where timm gives them:
    at every stage (TNT, ViTs with a forward of their own), or in the features alone, for a class
    token that joins the patches at the end (CaiT, XCiT, VOLO, PiT). If several scales have a class
    token each (CrossViT, CoaT), none is read. If only stages are read, the network stops after the
    last of them.

    Attributes:
        network: the description of the model.
    """

    def __init__(self, model: nn.Module) -> None:
        stages = getattr(model, "feature_info", ())
        forward = getattr(model, "forward_intermediates", None)
        recorded = () if forward is None else stages
        self.model = model
        num_prefix_tokens, self._at_every_stage = _prefix_tokens(model) if recorded else (0, False)
        self.network = Network(
            depth=max(len(stages), 1),
            dim=int(getattr(model, "num_features", 0)),
            dims=tuple(int(stage["num_chs"]) for stage in recorded),
            num_classes=int(getattr(model, "num_classes", 0)),
            num_prefix_tokens=num_prefix_tokens,
            has_class_token=num_prefix_tokens > 0 and _class_token(model) is not None,
            answering=("class",),
            final_norm=not isinstance(getattr(model, "norm", None), nn.Identity),
        )

    def grid(self, images: Tensor) -> tuple[int, int]:
        return (0, 0)

    def run(self, images: Float[Tensor, "B c h w"], needs: Needs) -> ViTOutput:
        """Run the model on whole images, and record what the resolved ``needs`` ask for.

        `ConfigError`: it has no attention or feature maps, or none on the meta device.
        """
        try:
            return self._run(images, needs)
        except ConfigError:
            raise
        except Exception as error:  # whatever somebody's code raises
            if not images.is_meta:
                raise
            if not needs.hidden and not needs.features:  # the cost of its logits is not counted
                blank = images.new_empty(len(images), self.network.num_classes)
                return ViTOutput(logits=blank.requires_grad_(), network=self.network)
            what = f"the cost of what is read of a {type(self.model).__name__} cannot be counted"
            fixes = "try a newer timm", "take another network"
            raise ConfigError(f"{what} ({error})", fixes) from error

    def _run(self, images: Float[Tensor, "B c h w"], needs: Needs) -> ViTOutput:
        kind = type(self.model).__name__
        if needs.attention or needs.qkv:
            raise ConfigError(f"{kind} is not a plain ViT and has no attention to record")
        if not needs.hidden and not needs.features:
            return ViTOutput(logits=_mean(self.model(images)), network=self.network)
        forward = getattr(self.model, "forward_intermediates", None)
        if forward is None:
            raise ConfigError(f"{kind} has no forward_intermediates, and no states to record")
        last = self.network.depth - 1
        stages = sorted(needs.hidden | {last} if needs.features else needs.hidden)
        asked = {"return_prefix_tokens": True} if self._at_every_stage else {}
        final = None
        if needs.logits or needs.features:
            final, found = forward(images, indices=stages, **asked)
        else:
            asked |= {"intermediates_only": True, "stop_early": True}
            found = forward(images, indices=stages, **asked)
        maps = dict(zip(stages, found, strict=True))
        grids = {i: _size(stage) for i, stage in maps.items()}
        return ViTOutput(
            logits=_mean(self.model.forward_head(final)) if needs.logits else None,  # type: ignore[operator]
            hidden={i: _as_tokens(maps[i]) for i in needs.hidden},
            features=self._features(final, maps[last]) if needs.features else None,
            grids=grids,
            network=self.network,
        )

    def _features(self, final: Any, last: Any) -> Float[Tensor, "B L D"]:
        """Return the output of ``forward_features`` as tokens, or ``last`` if its shape differs."""
        patches = _as_tokens(last[0] if isinstance(last, tuple) else last)
        final = getattr(final, "features", final)  # where it holds the logits too
        prefix, count = self.network.num_prefix_tokens, patches.shape[1]
        if isinstance(final, Tensor) and final.ndim == 4:
            if getattr(self.model, "output_fmt", "") == "NHWC":
                final = final.movedim(-1, 1)
            final = _as_tokens(final) if _size(final) == _size(last) else None
        if isinstance(final, Tensor) and final.ndim == 3 and final.shape[2] == patches.shape[2]:
            if final.shape[1] == prefix > 0:  # class tokens alone (PiT)
                return torch.cat([final, patches], dim=1)
            if final.shape[1] >= prefix + count:
                return final[:, final.shape[1] - prefix - count :]
        if prefix:
            kind = type(self.model).__name__
            raise ConfigError(f"the class token of {kind} is not where its patches are")
        return patches


def _mean(answer: Any) -> Tensor:
    """Return the mean answer of a distilled hybrid, which in training gives one a head."""
    if isinstance(answer, tuple):
        answer = sum(answer) / len(answer)
    mean: Tensor = answer
    return mean


def _class_token(model: nn.Module) -> Tensor | None:
    # NaFlexVit keeps its tokens in a module, and transformers' networks anywhere.
    token = getattr(getattr(model, "embeds", model), "cls_token", None)
    return token if isinstance(token, Tensor) and token.ndim == 3 else None


def _prefix_tokens(model: Any) -> tuple[int, bool]:
    """Return how many tokens precede the patches, and whether they do so at every stage."""
    count = int(getattr(model, "num_prefix_tokens", 0) or 0)
    if "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters:
        return count, count > 0  # timm's `Eva` without any fails if asked for them
    token = _class_token(model)
    return (0 if token is None else token.shape[1]), False


def _size(stage: Any) -> tuple[int, int]:
    patches = stage[0] if isinstance(stage, tuple) else stage
    return int(patches.shape[2]), int(patches.shape[3])


def _as_tokens(stage: Any) -> Float[Tensor, "B L D"]:
    """Return a stage's patches as tokens, behind its prefix tokens if it has any."""
    if isinstance(stage, tuple):
        patches, prefix = stage
        return torch.cat([prefix, _as_tokens(patches)], dim=1)
    return stage.flatten(2).transpose(1, 2)
