"""A recorded forward pass over an unmodified Vision Transformer: any patch subset, any last block,
nothing more computed.

Shape letters: B images, L tokens, P prefix tokens, N patches, K kept patches, H heads, D width, C
classes.
"""

from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import ConfigError
from .families import Family, family_of
from .needs import Needs
from .output import ViTOutput


def run_vit(
    model: nn.Module,
    images: Float[Tensor, "B channels height width"],
    needs: Needs,
    keep: Int[Tensor, "B K"] | None = None,
) -> ViTOutput:
    """Run as much of ``model`` on as many patches as ``needs`` and ``keep`` ask for, and record it.

    Only kept patches are embedded; blocks nobody reads from do not run; in the last block only the
    tokens the head reads are computed; no head is computed unless logits are needed. When every
    token is read the result equals ``model(images)`` bit for bit; the shortened last block and the
    gathered patch embedding agree with it to rounding.

    Args:
        model: a timm model, left as it is. Models outside the families give logits and hidden
            states of whole images only.
        images: normalised as the model expects.
        needs: what to record.
        keep: row-major indices into the patch grid, any order, one row an image; None for every
            patch.

    Raises:
        IndexError: a needed block does not exist.
        ConfigError: the model cannot give what is asked (patch subsets or attention outside the
            families).
    """
    family = family_of(model)
    needs = needs.resolve(family.depth)
    if not family.walks:
        if keep is not None or needs.attention or needs.qkv:
            what = "patches to choose from" if keep is not None else "attention to record"
            raise ConfigError(f"{type(model).__name__} is not a plain ViT and has no {what}")
        return _run_whole(family, images, needs)
    last = needs.num_blocks(family.depth) - 1
    hidden, attention, qkv = {}, {}, {}
    tokens = family.embed(images, keep)
    for i in range(last + 1):
        at_end = i == family.depth - 1
        reads_all = (
            i < last
            or i in needs.hidden
            or (at_end and needs.features)
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
        heads=family.heads,
        hidden=hidden,
        attention=attention,
        qkv=qkv,
        features=features,
        keep=keep,
        grid=family.grid(images),
        num_prefix_tokens=family.num_prefix_tokens,
        has_class_token=family.has_class_token,
        depth=family.depth,
    )


def _run_whole(family: Family, images: Tensor, needs: Needs) -> ViTOutput:
    logits, maps, last = family.run_whole(images, needs.logits, needs.hidden, needs.features)
    grids = {i: (int(stage.shape[2]), int(stage.shape[3])) for i, stage in maps.items()}
    if last is not None:
        grids[family.depth - 1] = (int(last.shape[2]), int(last.shape[3]))
    return ViTOutput(
        logits=logits,
        hidden={i: stage.flatten(2).transpose(1, 2) for i, stage in maps.items()},
        features=None if last is None else last.flatten(2).transpose(1, 2),
        grids=grids,
        depth=family.depth,
    )
