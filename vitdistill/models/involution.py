"""Involution, and RedNet: a ResNet whose 3 x 3 convolutions are involutions.

Importing this module registers with timm ``rednet26 .. rednet152`` and, for images of about 32 x
32, ``rednet26_small``, ``rednet38_small`` and ``rednet50_small``. Plain timm loads an exported
RedNet only after ``import vitdistill.models.involution``.

Source: "Involution: Inverting the Inherence of Convolution for Visual Recognition", Li et al., CVPR
2021, arXiv 2103.06255, checked against d-li14/involution@21c3158. What the authors' code cannot do:
sizes that the strides do not divide, and half precision.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import Float
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from ..errors import ConfigError
from ..messages import suggest
from .involution_op import involution as involution


class Involution(nn.Module):
    """Involution with kernels made from the pixel they stand on: ``W2 relu(BN(W1 u)) + b``.

    ``u`` is the input, or under a stride s its means over s x s cells. If s does not divide a side,
    the last cell is the mean of fewer pixels, and the output has ``ceil(side / s)`` places, as a
    convolution's (the authors' module fails). Parameters are named and initialised as the authors'.

    Args:
        channels: of input and output; a multiple of ``group_channels`` and ``reduction``.
        kernel_size: odd.
        stride: s.
        group_channels: channels that share a kernel.
        reduction: the kernel is made from ``channels / reduction`` numbers.

    Raises:
        ConfigError: the channels do not divide, or the kernel has no middle.

    Source: arXiv 2103.06255 section 3.2; ``involution_naive.py`` of d-li14/involution@21c3158.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        stride: int = 1,
        group_channels: int = 16,
        reduction: int = 4,
    ) -> None:
        super().__init__()
        multiple = math.lcm(group_channels, reduction)
        if channels % multiple or not kernel_size % 2:
            what = f"there is no involution of {channels} channels and a kernel of {kernel_size}"
            raise ConfigError(what, f"give a multiple of {multiple} channels, and an odd kernel")
        self.kernel_size = kernel_size
        self.stride = stride
        narrow = channels // reduction
        kernel_channels = channels // group_channels * kernel_size**2
        self.pool: nn.Module = nn.Identity()
        if stride > 1:
            self.pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
        squeeze = nn.Conv2d(channels, narrow, 1, bias=False)
        spread = nn.Conv2d(narrow, kernel_channels, 1)
        self.conv1 = nn.Sequential(
            OrderedDict(conv=squeeze, bn=nn.BatchNorm2d(narrow), act=nn.ReLU(inplace=True))
        )
        self.conv2 = nn.Sequential(OrderedDict(conv=spread))
        for conv in (squeeze, spread):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(spread.bias)  # type: ignore[arg-type]

    def forward(
        self, x: Float[Tensor, "B channels height width"]
    ) -> Float[Tensor, "B channels rows columns"]:
        return involution(x, self.conv2(self.conv1(self.pool(x))), self.kernel_size, self.stride)


DEPTHS = {
    26: (1, 2, 4, 1),
    38: (2, 3, 5, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
"""Blocks of each stage, by layers of the network."""


class _Block(Bottleneck):
    """timm's bottleneck with a 7 x 7 involution as its convolution, stride included."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conv2 = Involution(self.conv2.in_channels, 7, self.conv2.stride[0])  # type: ignore[assignment]


class RedNet(ResNet):
    """timm's ResNet with involutions: 7 x 7 in the bottlenecks, 3 x 3 in the stem.

    Stages have 256, 512, 1024 and 2048 channels by default and are 4, 8, 16 and 32 times smaller
    than the image. Everything else is timm's.

    Args:
        layers: blocks of each of the four stages, see `DEPTHS`.
        channels: of the involutions of each stage, whose output is 4 times as wide.
        stem_width: channels of the stem's involution, whose output is twice as wide.
        small_images: no stride in the stem and no pooling after it, for images of about 32 x 32, on
            which the authors' network ends at one pixel. This form is not the authors'.

    Raises:
        ConfigError: there are not four stages, or an involution's channels do not divide.

    Source: arXiv 2103.06255 section 4.1; ``rednet.py`` of d-li14/involution@21c3158.
    """

    # Not timm's whole list of arguments: involutions have no dilation, groups or second pooling.
    def __init__(
        self,
        layers: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        channels: Sequence[int] = (64, 128, 256, 512),
        stem_width: int = 32,
        small_images: bool = False,
    ) -> None:
        if not len(layers) == len(channels) == 4:
            what = f"a RedNet has four stages, not layers {[*layers]} of channels {[*channels]}"
            raise ConfigError(what, "give four of each")
        block: Any = _Block
        super().__init__(
            block,
            tuple(layers),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            channels=tuple(channels),
            stem_width=stem_width,
            stem_type="deep",
        )
        # timm's deep stem: convolution, norm, act, convolution, norm, act, convolution.
        stem: Any = self.conv1
        stem[3] = Involution(stem_width, 3)
        if small_images:
            stem[0] = nn.Conv2d(in_chans, stem_width, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(stem[0].weight, mode="fan_out", nonlinearity="relu")
            self.maxpool = nn.Sequential()
            for stage, reduction in zip(self.feature_info, (1, 1, 2, 4, 8), strict=True):
                stage["reduction"] = reduction


def rednet(depth: int, num_classes: int = 1000, **options: Any) -> RedNet:
    """Return a RedNet of 26, 38, 50, 101 or 152 layers; ``options`` are `RedNet`'s.

    Raises `ConfigError` for any other depth.
    """
    if depth not in DEPTHS:
        fix = suggest(str(depth), map(str, DEPTHS))
        raise ConfigError(f"there is no RedNet of {depth} layers", fix)
    return RedNet(DEPTHS[depth], num_classes, **options)


# The stem's names, the authors' and timm's; those of the stages are the same.
_STEM = {
    "stem.0.conv.": "conv1.0.",
    "stem.0.bn.": "conv1.1.",
    "stem.1.": "conv1.3.",
    "stem.2.": "conv1.4.",
    "stem.4.conv.": "conv1.6.",
    "stem.4.bn.": "bn1.",
}


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return a checkpoint under timm's names, from the authors' names or timm's."""
    renamed = {}
    for key, value in state_dict.items():
        key = key.removeprefix("backbone.").removeprefix("head.")
        for theirs, ours in _STEM.items():
            if key.startswith(theirs):
                key = ours + key.removeprefix(theirs)
        renamed[key] = value
    return renamed


# --- timm's registry -----------------------------------------------------------------------------

_LAYERS = {"first_conv": "conv1.0", "classifier": "fc"}
_LARGE = {**_LAYERS, "pool_size": (7, 7), "interpolation": "bilinear"}
_SMALL = {**_LAYERS, "pool_size": (4, 4), "input_size": (3, 32, 32), "crop_pct": 1.0}

_CFGS: dict[str, Any] = {f"rednet{depth}": _LARGE for depth in DEPTHS}
_CFGS |= {f"rednet{depth}_small": _SMALL for depth in (26, 38, 50)}
default_cfgs = generate_default_cfgs(_CFGS)


def register(kind: type, name: str, filter_fn: Callable[..., Any], **shape: Any) -> None:
    """Register a network under timm's rules: a function's name and module are the network's."""

    def create(pretrained: bool = False, **options: Any) -> Any:
        given = {"pretrained_filter_fn": filter_fn, **shape, **options}
        return build_model_with_cfg(kind, name, pretrained, **given)

    create.__name__, create.__module__ = name, kind.__module__
    register_model(create)


for _name in default_cfgs:
    _depth, _, _small = _name.removeprefix("rednet").partition("_")
    _shape = {"layers": DEPTHS[int(_depth)], "small_images": bool(_small)}
    register(RedNet, _name, checkpoint_filter_fn, **_shape)
