"""A recorded forward pass over an unmodified Vision Transformer.

Shape letters: B images, L tokens, P prefix tokens, N patches, K kept patches, H heads, D width,
C classes.
"""

from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import ConfigError
from .families import family_of
from .needs import Needs
from .output import ViTOutput
from .plain import PlainViT
from .whole import Whole


def run_vit(
    model: nn.Module,
    images: Float[Tensor, "B channels height width"],
    needs: Needs,
    keep: Int[Tensor, "B K"] | None = None,
) -> ViTOutput:
    """Run as much of ``model`` on as many patches as ``needs`` and ``keep`` ask for, and record it.

    Only kept patches are embedded; blocks nobody reads do not run; the last block computes only the
    tokens that are read; no head runs unless logits are needed. When every token is read the result
    equals ``model(images)`` bit for bit; otherwise it agrees to rounding.

    Args:
        model: a timm model, left as it is. Models outside the families give logits and hidden
            states of whole images only.
        images: normalised as the model expects.
        needs: what to record.
        keep: row-major indices into the patch grid, any order, one row an image; None: all patches.

    Raises:
        IndexError: a needed block does not exist.
        ConfigError: the model has no patches to choose from, or no attention to record.
    """
    family = family_of(model)
    needs = needs.resolve(family.network.depth)
    if not isinstance(family, Whole):
        return _walk(family, images, needs, keep)
    if keep is not None:
        raise ConfigError(
            f"{type(model).__name__} is not a plain ViT and has no patches to choose from"
        )
    return family.run(images, needs)


def _walk(family: PlainViT, images: Tensor, needs: Needs, keep: Tensor | None) -> ViTOutput:
    network = family.network
    last = needs.num_blocks(network.depth) - 1
    hidden, attention, qkv = {}, {}, {}
    tokens = family.embed(images, keep)
    for i in range(last + 1):
        reads_all = (
            i < last
            or i in needs.hidden
            or needs.features
            or (needs.logits and family.num_head_tokens is None)
        )
        rows = None if reads_all else (family.num_head_tokens if needs.logits else 0)
        ran = family.run_block(i, tokens, rows, i in needs.attention, i in needs.qkv)
        tokens = ran.tokens
        if i in needs.hidden:
            hidden[i] = tokens
        if ran.attention is not None:
            attention[i] = ran.attention
        if ran.qkv is not None:
            qkv[i] = ran.qkv
    logits = head_logits = features = None
    if needs.logits or needs.features:
        normed = family.norm(tokens)
        features = normed if needs.features else None
        if needs.logits:
            logits, head_logits = family.head(normed)
    return ViTOutput(
        logits=logits,
        head_logits=head_logits,
        hidden=hidden,
        attention=attention,
        qkv=qkv,
        features=features,
        keep=keep,
        grid=family.grid(images),
        network=network,
    )
