"""Students with a token and a head for each of several teachers (Co-advise), under names that
timm's `create_model` finds.

Importing this module registers ``advised_vit``, any plain ViT with learned teacher tokens, and
``cit_tiny_patch16_224``, ``cit_small_patch16_224`` and ``cit_base_patch16_224``, whose teacher
tokens are made by a convolutional and an involutional stem. An exported student therefore loads
with plain timm once ``import vitdistill.models.advised`` has run in that process, and is an unknown
network before.

Source: "Co-advise: Cross Inductive Bias Distillation", Ren et al., CVPR 2022, arXiv 2106.12378,
checked against OliverRensu/co-advise@8049918. What the authors' code cannot do: images other than
224 x 224, stochastic depth, and teachers other than one convolutional and one involutional.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    is_model_in_modules,
    load_pretrained,
    model_entrypoint,
    register_model,
)
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from ..errors import ConfigError
from ..vit.heads import TokenHeads, teacher_names
from .involution import Involution

# -- heads ----------------------------------------------------------------------------------------


# -- learned tokens on any plain ViT --------------------------------------------------------------


class AdvisedViT(VisionTransformer):
    """timm's `VisionTransformer` with a token and a head for each teacher, behind the class token;
    its forward is timm's own.
    """

    teachers: tuple[str, ...]
    prediction: str | Sequence[float]

    def advise(self, teachers: Sequence[str], prediction: str | Sequence[float]) -> None:
        """Give the network the heads of these teachers, in place of the one it has."""
        self.teachers, self.prediction = teacher_names(teachers), prediction
        self.reset_classifier(self.num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for ``num_classes``; 0: none, and the network gives its normed tokens, as
        timm's do that do not pool.
        """
        if global_pool:
            raise ConfigError(
                f"an advised student does not pool, and global_pool is {global_pool!r}: leave"
                " it out"
            )
        self.num_classes = num_classes
        if num_classes > 0:
            heads: Any = TokenHeads(self.embed_dim, num_classes, self.teachers, self.prediction).to(
                self.cls_token
            )
        else:
            heads = nn.Identity()
        self.head = heads.train(self.training)


_BASES = ("vision_transformer", "vision_transformer_hybrid", "deit")  # timm's files of plain ViTs
_OURS = ("reg_tokens", "class_token", "global_pool")


def _refuse_own(name: str, options: dict[str, Any], fixed: Sequence[str]) -> None:
    """Raises `ConfigError` for an argument that the form of the student decides."""
    for key in fixed:
        if options.get(key, "") != "":
            raise ConfigError(f"{name} decides {key} itself: leave it out of the model's arguments")


def _refuse_base(base: str, options: dict[str, Any]) -> None:
    """Raises `ConfigError` for a base that teacher tokens cannot be added to."""
    advice = "take one such as vit_tiny_patch16_224 (model_args.base)"
    if not is_model_in_modules(base, _BASES):
        raise ConfigError(f"the base {base!r} of advised_vit is no plain ViT of timm's: {advice}")
    probe = model_entrypoint(base.partition(".")[0])(
        pretrained=False, **{**options, "depth": 1, "num_classes": 0}
    )
    if type(probe) is not VisionTransformer:
        raise ConfigError(
            f"the base {base!r} of advised_vit is a {type(probe).__name__} and no plain ViT:"
            f" {advice}"
        )
    if probe.cls_token is None:
        raise ConfigError(
            f"the base {base!r} of advised_vit has no class token for the labels to train: {advice}"
        )
    if probe.num_reg_tokens:
        raise ConfigError(
            f"the base {base!r} of advised_vit has register tokens, whose place the teachers'"
            f" tokens take: {advice}"
        )


# -- Co-advise's form -----------------------------------------------------------------------------


def _bn_relu(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


class TwoStems(nn.Module):
    """Two patch embeddings side by side, one of convolutions and one with an involution, and a
    token of each.

    Each halves the image by its first convolution (stride 2), to 64 channels, and projects
    ``patch_size / 2`` squares of that. What comes out is ``[mean of the conv stem's tokens, mean of
    the inv stem's tokens, sum of both stems' tokens]``.

    Args:
        img_size: height and width, or one number for both.
        patch_size: likewise; even, and a divisor of the image's side.
        in_chans: channels of the image.
        embed_dim: width of the tokens.
        bias: of the two projections.
        dynamic_img_pad: has to be False.
        device: of the parameters; ``dtype``: their type.

    Raises:
        ConfigError: the patch size is odd or does not divide the image's side.

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
        """Kaiming normal for every convolution, the projections and the involution's own
        included.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Another image size, as timm's `PatchEmbed` has it; the patch size stays."""
        size = (
            self.img_size if img_size is None else tuple(int(side) for side in to_2tuple(img_size))
        )
        if patch_size is not None and tuple(to_2tuple(patch_size)) != self.patch_size:
            raise ConfigError(
                f"two stems of patch size {self.patch_size} cannot be given another ({patch_size}):"
                " build them anew"
            )
        for side, step in zip(size, self.patch_size, strict=True):
            if step < 2 or step % 2 or side % step:
                raise ConfigError(
                    f"two stems cannot cut {size[0]} x {size[1]} pixels into patches of"
                    f" {self.patch_size[0]} x {self.patch_size[1]}: choose an even patch size, and"
                    " an image size that is a multiple of it"
                )
        self.img_size: tuple[int, int] = (size[0], size[1])
        self.grid_size = (size[0] // self.patch_size[0], size[1] // self.patch_size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels a patch, as timm's `PatchEmbed` tells them."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches for images of this size."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def forward(self, images: Float[Tensor, "B c h w"]) -> Float[Tensor, "B L D"]:
        if tuple(images.shape[-2:]) != self.img_size:
            raise ConfigError(
                f"images are {images.shape[-2]} x {images.shape[-1]}, and the student takes"
                f" {self.img_size[0]} x {self.img_size[1]}"
            )
        conv = self.conv(images).flatten(2).transpose(1, 2)
        inv = self.inv(images).flatten(2).transpose(1, 2)
        return torch.cat([conv.mean(1, keepdim=True), inv.mean(1, keepdim=True), conv + inv], dim=1)


class CiT(AdvisedViT):
    """Co-advise's student: the tokens ``[class, conv, inv, patches]``, of which its two stems make
    all but the class token.

    Blocks, position table (one entry for every token) and forward are timm's. The image size is
    fixed when it is built.

    Args:
        prediction: see `TokenHeads`.
        options: those of timm's `VisionTransformer`, apart from what makes the form.

    Raises:
        ConfigError: an argument is given that the form decides.

    Source: ``models.py::DistilledVisionTransformer`` of OliverRensu/co-advise@8049918, whose
        stochastic depth never reaches its blocks.
    """

    def __init__(self, prediction: str | Sequence[float] = "mean", **options: Any) -> None:
        fixed = (
            "embed_layer",
            "embed_norm_layer",
            "dynamic_img_size",
            "dynamic_img_pad",
            "no_embed_class",
            "pos_embed",
            "pre_norm",
        )
        _refuse_own("a cit student", options, _OURS + fixed)
        embed: Any = TwoStems
        super().__init__(**{**options, "embed_layer": embed, "reg_tokens": 2, "global_pool": ""})
        self.reg_token = (
            None  # its place in the position table is that of the tokens the stems make
        )
        self.advise(("conv", "inv"), prediction)


# -- names in timm's registry ---------------------------------------------------------------------


def _classifiers(count: int) -> tuple[str, ...]:
    return tuple(f"head.linears.{i}" for i in range(count))


def _cfg(first_conv: tuple[str, ...] | str, num_heads: int) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": _classifiers(num_heads),
    }


_SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
_STEMS = ("patch_embed.conv.0", "patch_embed.inv.0")

default_cfgs = generate_default_cfgs(
    {
        "advised_vit": _cfg("patch_embed.proj", 3),
        **{f"cit_{size}_patch16_224": _cfg(_STEMS, 3) for size in _SIZES},
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
    """A plain ViT with a learned token and a head for each teacher, behind its class token: DeiT's
    distillation token, several times.

    Args:
        pretrained: there are no pretrained weights; timm sets it to load an export.
        base: timm's name of a plain ViT with a class token and without registers; a tag gives its
            normalisation, not its weights.
        teachers: names of the tokens, in order.
        prediction: see `TokenHeads`.
        options: those of the base.

    Raises:
        ConfigError: no such base, or names or a prediction that make no sense.
    """
    names = teacher_names(teachers)
    _refuse_own("advised_vit", options, _OURS)
    given = {
        key: options.pop(key, None)
        for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    }
    _refuse_base(base, options)
    architecture, _, tag = base.partition(".")
    saved = given["pretrained_cfg"] is not None
    if pretrained and not saved:
        raise ConfigError(
            "there are no pretrained weights of advised_vit, only those of exports: leave"
            " pretrained out"
        )
    given["pretrained_cfg"] = given["pretrained_cfg"] or tag or None
    build = model_entrypoint(architecture)
    model: Any = build(
        pretrained=False, **{**options, **given, "reg_tokens": len(names), "global_pool": ""}
    )
    model.__class__ = AdvisedViT
    nn.init.trunc_normal_(model.reg_token, std=0.02)  # as DeiT's distillation token
    model.advise(names, prediction)
    model.pretrained_cfg.update(architecture="advised_vit", classifier=_classifiers(1 + len(names)))
    if not saved:  # where the base's own weights are, and how they are read
        for key in ("url", "hf_hub_id", "file", "custom_load"):
            model.pretrained_cfg.pop(key, None)
    if pretrained:
        cfg, chans = model.pretrained_cfg, options.get("in_chans", 3)
        load_pretrained(
            model,
            cfg,
            num_classes=model.num_classes,
            in_chans=chans,
            filter_fn=checkpoint_filter_fn,
            cache_dir=given["cache_dir"],
        )
    advised: AdvisedViT = model
    return advised


def _create(size: str, pretrained: bool, options: dict[str, Any]) -> CiT:
    width, heads = _SIZES[size]
    shape = {"patch_size": 16, "embed_dim": width, "depth": 12, "num_heads": heads}
    made: CiT = build_model_with_cfg(
        CiT,
        f"cit_{size}_patch16_224",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**shape, **options},
    )
    return made


@register_model
def cit_tiny_patch16_224(pretrained: bool = False, **options: Any) -> CiT:
    """CiT-Ti, 7.6 M parameters; ``options`` are `CiT`'s. There are no pretrained weights."""
    return _create("tiny", pretrained, options)


@register_model
def cit_small_patch16_224(pretrained: bool = False, **options: Any) -> CiT:
    """CiT-S, 25.8 M parameters; see `cit_tiny_patch16_224`."""
    return _create("small", pretrained, options)


@register_model
def cit_base_patch16_224(pretrained: bool = False, **options: Any) -> CiT:
    """CiT-B, 93.9 M parameters; see `cit_tiny_patch16_224`."""
    return _create("base", pretrained, options)
