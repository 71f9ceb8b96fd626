"""Families of networks: how a network embeds patches, walks its blocks and answers."""

from dataclasses import replace
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .network import Network
from .output import BlockRun
from .plain import PlainViT
from .whole import Whole


class Walker(Protocol):
    """A network that `run_vit` walks: embed patches, run blocks one by one, norm, answer.

    A family that implements it goes into `family_of`. It accepts only models for which walking by
    hand equals their own ``forward``.

    Attributes:
        network: the description of the model.
        num_head_tokens: the head reads only the first so many tokens; None: it may read all.
    """

    @property
    def network(self) -> Network: ...
    @property
    def num_head_tokens(self) -> int | None: ...

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Return rows and columns of the patch grid for images of this size."""
        ...

    def embed(self, images: Float[Tensor, "B c h w"], keep: Int[Tensor, "B K"] | None) -> Tensor:
        """Return the tokens before block 0, ``(B, P+K, D)``."""
        ...

    def run_block(
        self, i: int, tokens: Tensor, rows: int | None, attention: bool = False, qkv: bool = False
    ) -> BlockRun:
        """Run block ``i``, for its first ``rows`` output tokens or (None) for all.

        ``attention`` and ``qkv`` ask for the record of these; attention is float32.
        """
        ...

    def norm(self, tokens: Tensor) -> Tensor:
        """Apply the final norm to the last block's output, token by token."""
        ...

    def head(
        self, features: Tensor
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B heads C"] | None]:
        """Return the logits, and each head's own if there are several."""
        ...


def family_of(model: nn.Module) -> Walker | Whole:
    """Return ``model`` as seen by its family; one outside all families is run whole."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    return PlainViT(model) if PlainViT.accepts(model) else Whole(model)


def describe_network(
    model: nn.Module,
    name: str,
    architecture: str,
    image_size: tuple[int, int],
    num_classes: int | None = None,
) -> Network:
    """Describe ``model`` on images of ``image_size``.

    ``num_classes`` overrides the head's own count when answers are matched to fewer classes.
    """
    family = family_of(model)
    network = family.network
    return replace(
        network,
        name=name,
        architecture=architecture,
        image_size=image_size,
        num_classes=network.num_classes if num_classes is None else num_classes,
        num_parameters=sum(p.numel() for p in model.parameters()),
        grid=family.grid(torch.empty(0, 3, *image_size, device="meta")),
    )
