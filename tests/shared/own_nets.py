"""Networks of a user's own, as `package.module:factory` names them; this file's name is the module."""

from collections.abc import Callable
from typing import Any, ClassVar

import timm
import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Three classes by colour; all of its tensors are in one attribute."""

    pretrained_cfg: ClassVar = {"input_size": (3, 16, 16), "classifier": "net.4"}

    def __init__(self, num_classes: int = 3, width: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(3, width, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            nn.Linear(width, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


class Reads(Net):
    """What it computes depends on what its tensors hold."""

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images if float(images.sum()) < 1e9 else -images)


def vit(**args: Any) -> nn.Module:
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", **{**small, **args})


def colours(scale: float = 9.0) -> Callable[[Tensor], Any]:
    """No network: it is right on every image of `small_runs.write_images`."""

    def answer(images: Tensor) -> Any:
        return (images.mean((2, 3)) * scale).tolist()

    return answer


class Broken(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, images: Tensor) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def nothing() -> None:
    return None


def unlucky() -> nn.Module:
    raise ValueError("no such luck\nat all")


def lost() -> nn.Module:
    return Broken(KeyError("a"))


def a_map() -> nn.Module:
    return Broken(torch.zeros(2, 3, 4))


def one_row() -> nn.Module:
    return Broken(torch.zeros(1, 3))


def whole_numbers() -> nn.Module:
    return Broken(torch.zeros(2, 3, dtype=torch.long))


def a_dict() -> nn.Module:
    return Broken({"logits": torch.zeros(2, 3)})


def other_count() -> nn.Module:
    net = Net(3)
    net.num_classes = 1000
    return net


def three_only() -> nn.Module:
    return Net(3)


five = 5
