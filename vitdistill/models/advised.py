"""Students with a token and a head for each of several teachers (Co-advise).

Importing this module registers with timm ``advised_vit``, any plain ViT with learned teacher
tokens, and ``cit_tiny_patch16_224``, ``cit_small_patch16_224`` and ``cit_base_patch16_224``, whose
teacher tokens are made by a convolutional and an involutional stem. Plain timm loads an exported
student only after ``import vitdistill.models.advised``.

Source: "Co-advise: Cross Inductive Bias Distillation", Ren et al., CVPR 2022, arXiv 2106.12378,
checked against OliverRensu/co-advise@8049918. What the authors' code cannot do: images other than
224 x 224, stochastic depth, and teachers other than one convolutional and one involutional.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import to_2tuple
from timm.models import (
    generate_default_cfgs,
    is_model_in_modules,
    load_pretrained,
    model_entrypoint,
    register_model,
)
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from ..errors import ConfigError, Set
from ..vit.heads import TokenHeads, teacher_names
from .involution import Involution, register


class AdvisedViT(VisionTransformer):
    """timm's `VisionTransformer`, forward included, with a token and a head for each teacher."""

    teachers: tuple[str, ...]
    prediction: str | Sequence[float]

    def advise(self, teachers: Sequence[str], prediction: str | Sequence[float]) -> None:
        """Replace the network's head by one for each of these teachers and the class token."""
        self.teachers, self.prediction = teacher_names(teachers), prediction
        self.reset_classifier(self.num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make new heads; with 0 classes the network returns its normed tokens."""
        assert not global_pool, "every head reads its own token: there is nothing to pool"
        self.num_classes = num_classes
        if num_classes > 0:
            heads: Any = TokenHeads(self.embed_dim, num_classes, self.teachers, self.prediction)
            heads.to(self.cls_token)
        else:
            heads = nn.Identity()
        self.head = heads.train(self.training)


def _bn_relu(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


class TwoStems(nn.Module):
    """Two patch embeddings side by side, one of convolutions and one with an involution.

    Each halves the image by its first convolution (stride 2), to 64 channels, and projects
    ``patch_size / 2`` squares of that. The output is ``[mean of the conv stem's tokens, mean of the
    inv stem's tokens, sum of both stems' tokens]``.

    Arguments are those of timm's `PatchEmbed`. Patches are of even size and fill the image.

    Source: ``models.py::embed_conv``, ``embed_inv`` and ``forward_features`` of
    OliverRensu/co-advise@8049918.
    """

    strict_img_size = True
    dynamic_img_pad = False

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        dynamic_img_pad: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.patch_size: tuple[int, int] = to_2tuple(patch_size)
        self.set_input_size(img_size)
        height, width = self.patch_size
        half = (height // 2, width // 2)
        self.conv = nn.Sequential(
            *(nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False), *_bn_relu(64)),
            *(nn.Conv2d(64, 64, 3, padding=1, bias=False), *_bn_relu(64)),
            *(nn.Conv2d(64, 64, 3, padding=1, bias=False), *_bn_relu(64)),
            nn.Conv2d(64, embed_dim, half, stride=half, bias=bias),
        )
        self.inv = nn.Sequential(
            *(nn.Conv2d(in_chans, 32, 3, stride=2, padding=1, bias=False), *_bn_relu(32)),
            *(Involution(32, 3), *_bn_relu(32)),
            *(nn.Conv2d(32, 64, 3, padding=1, bias=False), *_bn_relu(64)),
            nn.Conv2d(64, embed_dim, half, stride=half, bias=bias),
        )
        self.init_weights()
        self.to(device=device, dtype=dtype)

    def init_weights(self) -> None:
        """Initialise every convolution, the involution's too, by Kaiming normal."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Take another image size, as timm's `PatchEmbed` does; the patch size stays."""
        assert patch_size is None, "the stems' strides are made for their patch size"
        size = self.img_size if img_size is None else tuple(map(int, to_2tuple(img_size)))
        even = all(step > 0 and step % 2 == 0 for step in self.patch_size)
        fills = even and not any(a % b for a, b in zip(size, self.patch_size, strict=True))
        assert fills, "patches have to be of even size and to fill the image"
        self.img_size: tuple[int, int] = (size[0], size[1])
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def forward(self, images: Float[Tensor, "B c h w"]) -> Float[Tensor, "B L D"]:
        assert tuple(images.shape[-2:]) == self.img_size, "images are of another size"
        conv = self.conv(images).flatten(2).transpose(1, 2)
        inv = self.inv(images).flatten(2).transpose(1, 2)
        return torch.cat([conv.mean(1, keepdim=True), inv.mean(1, keepdim=True), conv + inv], dim=1)


class CiT(AdvisedViT):
    """Co-advise's student: tokens ``[class, conv, inv, patches]``, all but the first from stems.

    Blocks, position table (one entry for every token) and forward are timm's. The image size is
    fixed at construction.

    ``options`` are those of timm's `VisionTransformer`, except what makes the form.

    Source: ``models.py::DistilledVisionTransformer`` of OliverRensu/co-advise@8049918, whose
        stochastic depth never reaches its blocks.
    """

    def __init__(self, prediction: str | Sequence[float] = "mean", **options: Any) -> None:
        stems: Any = TwoStems
        # Python refuses options that repeat one of these.
        super().__init__(
            embed_layer=stems,
            embed_norm_layer=None,
            class_token=True,
            reg_tokens=2,
            pos_embed="learn",
            no_embed_class=False,
            dynamic_img_size=False,
            dynamic_img_pad=False,
            global_pool="",
            **options,
        )
        self.reg_token = None  # the stems' tokens take its places in the position table
        self.advise(("conv", "inv"), prediction)


# --- timm's registry -----------------------------------------------------------------------------

_SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
_PLAIN = ("vision_transformer", "vision_transformer_hybrid", "deit")  # timm's files of plain ViTs


def _heads(count: int) -> dict[str, Any]:
    return {"classifier": tuple(f"head.linears.{i}" for i in range(count))}


_CIT = {"first_conv": ("patch_embed.conv.0", "patch_embed.inv.0"), "fixed_input_size": True}

default_cfgs = generate_default_cfgs(
    {
        "advised_vit": {"first_conv": "patch_embed.proj", "fixed_input_size": True, **_heads(3)},
        **{f"cit_{size}_patch16_224": {**_CIT, **_heads(3)} for size in _SIZES},
    }
)


@register_model
def advised_vit(
    pretrained: bool = False,
    base: str = "vit_tiny_patch16_224",
    teachers: Sequence[str] = ("conv", "inv"),
    prediction: str | Sequence[float] = "mean",
    **options: Any,
) -> AdvisedViT:
    """Return a plain ViT with a learned token and a head for each teacher, as DeiT has for one.

    Args:
        pretrained: timm sets it to load an export; there are no other pretrained weights.
        base: timm's name of a plain ViT with a class token; a tag gives its normalisation, not its
            weights. Teachers' tokens take the place of its registers.
        teachers: names of the tokens, in order.
        prediction: see `TokenHeads`.
        options: those of the base.
    """
    names = teacher_names(teachers)
    architecture, _, tag = base.partition(".")
    saved, cache_dir = options.pop("pretrained_cfg", None), options.pop("cache_dir", None)
    probe: Any = None
    if is_model_in_modules(base, _PLAIN):
        one_block = {**options, "depth": 1, "num_classes": 0}
        probe = model_entrypoint(architecture)(pretrained=False, **one_block)
    is_plain = type(probe) is VisionTransformer and probe.cls_token is not None
    if not is_plain:
        what = f"the base {base!r} of advised_vit is no plain ViT with a class token"
        fix = Set("student.model_args.base", "vit_tiny_patch16_224")
        raise ConfigError(what, fix, field="student.model_args")
    model: Any = model_entrypoint(architecture)(
        pretrained=False,
        reg_tokens=len(names),
        global_pool="",
        pretrained_cfg=saved or tag or None,
        **options,
    )
    # timm's function makes a network of its own class, and takes no other.
    model.__class__ = AdvisedViT
    nn.init.trunc_normal_(model.reg_token, std=0.02)  # as DeiT's distillation token
    model.advise(names, prediction)
    model.pretrained_cfg.update(architecture="advised_vit", **_heads(1 + len(names)))
    if saved is None:  # the base's own weights are not this network's
        for key in ("url", "hf_hub_id", "file", "custom_load"):
            model.pretrained_cfg.pop(key, None)
    if pretrained:
        load_pretrained(
            model,
            model.pretrained_cfg,
            num_classes=model.num_classes,
            in_chans=options.get("in_chans", 3),
            filter_fn=checkpoint_filter_fn,
            cache_dir=cache_dir,
        )
    advised: AdvisedViT = model
    return advised


for _size, (_width, _count) in _SIZES.items():
    _shape = {"patch_size": 16, "embed_dim": _width, "depth": 12, "num_heads": _count}
    register(CiT, f"cit_{_size}_patch16_224", checkpoint_filter_fn, **_shape)
