"""How one family of networks embeds patches, walks its blocks and answers; `family_of` finds a
model's family.
"""

from torch import nn

from .family import QKV as QKV
from .family import Family as Family
from .plain import PlainViT
from .whole import WholeImage


def family_of(model: nn.Module) -> Family:
    """The family ``model`` belongs to; models outside all families run on whole images only
    (`WholeImage`).
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    families: tuple[type[Family], ...] = (PlainViT,)
    for family in families:
        if family.accepts(model):
            return family(model)
    return WholeImage(model)
