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

from ..errors import ConfigError, Set
from ..vit.heads import TokenHeads, teacher_names
from .involution import Involution


class AdvisedViT(VisionTransformer):
    """timm's `VisionTransformer`, forward included, with a token and a head for each teacher."""

    teachers: tuple[str, ...]
    prediction: str | Sequence[float]

    def advise(self, teachers: Sequence[str], prediction: str | Sequence[float]) -> None:
        """Replace the network's head by one for each of these teachers and the class token."""
        self.teachers, self.prediction = teacher_names(teachers), prediction
        self.reset_classifier(self.num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make new heads; with 0 classes the network gives its normed tokens."""
        if global_pool:
            raise ConfigError(
                f"an advised student does not pool, and global_pool is {global_pool!r}",
                fix="leave global_pool out",
                field="student.model_args",
            )
        self.num_classes = num_classes
        if num_classes > 0:
            heads: Any = TokenHeads(self.embed_dim, num_classes, self.teachers, self.prediction)
            heads.to(self.cls_token)
        else:
            heads = nn.Identity()
        self.head = heads.train(self.training)


_BASES = ("vision_transformer", "vision_transformer_hybrid", "deit")  # timm's files of plain ViTs
_OURS = ("reg_tokens", "class_token", "global_pool")


def _refuse_own(name: str, options: dict[str, Any], fixed: Sequence[str]) -> None:
    """Raise `ConfigError` for an argument that the form of the student decides."""
    for key in fixed:
        if options.get(key, "") != "":
            raise ConfigError(
                f"{name} decides {key} itself",
                fix=f"leave student.model_args.{key} out",
                field="student.model_args",
            )


def _refuse_base(base: str, options: dict[str, Any]) -> None:
    """Raise `ConfigError` for a base that teacher tokens cannot be added to."""
    fault = "is no plain ViT of timm's"
    if is_model_in_modules(base, _BASES):
        probe = model_entrypoint(base.partition(".")[0])(
            pretrained=False, **{**options, "depth": 1, "num_classes": 0}
        )
        if type(probe) is not VisionTransformer:
            fault = f"is a {type(probe).__name__} and no plain ViT"
        elif probe.cls_token is None:
            fault = "has no class token for the labels to train"
        elif probe.num_reg_tokens:
            fault = "has register tokens, whose place the teachers' tokens take"
        else:
            return
    raise ConfigError(
        f"the base {base!r} of advised_vit {fault}",
        fix=Set("student.model_args.base", "vit_tiny_patch16_224"),
        field="student.model_args",
    )


def _bn_relu(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


class TwoStems(nn.Module):
    """Two patch embeddings side by side, one of convolutions and one with an involution.

    Each halves the image by its first convolution (stride 2), to 64 channels, and projects
    ``patch_size / 2`` squares of that. The output is ``[mean of the conv stem's tokens, mean of the
    inv stem's tokens, sum of both stems' tokens]``.

    Args:
        img_size: height and width, or one number for both.
        patch_size: likewise; even, and a divisor of the image's side.
        in_chans: channels of the image.
        embed_dim: width of the tokens.
        bias: of the two projections.
        dynamic_img_pad: has to be False.
        device: of the parameters.
        dtype: of the parameters.

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
        """Initialise every convolution, the involution's too, by Kaiming normal."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Take another image size, as timm's `PatchEmbed` does; the patch size stays."""
        size = self.img_size if img_size is None else tuple(map(int, to_2tuple(img_size)))
        if patch_size is not None and tuple(to_2tuple(patch_size)) != self.patch_size:
            raise ConfigError(
                f"two stems of patch size {self.patch_size} cannot be given another ({patch_size})"
            )
        for side, step in zip(size, self.patch_size, strict=True):
            if step < 2 or step % 2 or side % step:
                raise ConfigError(
                    f"two stems cannot cut {size[0]} x {size[1]} pixels into patches of"
                    f" {self.patch_size[0]} x {self.patch_size[1]}",
                    fix="choose an even patch size, and an image size that is a multiple of it",
                    field="student.model_args",
                )
        self.img_size: tuple[int, int] = (size[0], size[1])
        self.grid_size = (size[0] // self.patch_size[0], size[1] // self.patch_size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Return the pixels a patch, as timm's `PatchEmbed` does."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of patches for images of this size."""
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
    """Co-advise's student: tokens ``[class, conv, inv, patches]``, all but the first from stems.

    Blocks, position table (one entry for every token) and forward are timm's. The image size is
    fixed at construction.

    Args:
        prediction: see `TokenHeads`.
        options: those of timm's `VisionTransformer`, except what makes the form.

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
        self.reg_token = None  # the stems' tokens take its places in the position table
        self.advise(("conv", "inv"), prediction)


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
    """Return a plain ViT with a learned token and a head for each teacher.

    DeiT's distillation token, several times.

    Args:
        pretrained: timm sets it to load an export; there are no other pretrained weights.
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
    kept = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    given = {key: options.pop(key, None) for key in kept}
    _refuse_base(base, options)
    architecture, _, tag = base.partition(".")
    saved = given["pretrained_cfg"] is not None
    if pretrained and not saved:
        raise ConfigError(
            "there are no pretrained weights of advised_vit, only those of exports",
            fix=Set("student.pretrained", False),
            field="student.pretrained",
        )
    given["pretrained_cfg"] = given["pretrained_cfg"] or tag or None
    form = {**options, **given, "reg_tokens": len(names), "global_pool": ""}
    model: Any = model_entrypoint(architecture)(pretrained=False, **form)
    model.__class__ = AdvisedViT
    nn.init.trunc_normal_(model.reg_token, std=0.02)  # as DeiT's distillation token
    model.advise(names, prediction)
    model.pretrained_cfg.update(architecture="advised_vit", classifier=_classifiers(1 + len(names)))
    if not saved:  # the base's own weights are not this network's
        for key in ("url", "hf_hub_id", "file", "custom_load"):
            model.pretrained_cfg.pop(key, None)
    if pretrained:
        load_pretrained(
            model,
            model.pretrained_cfg,
            num_classes=model.num_classes,
            in_chans=options.get("in_chans", 3),
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
