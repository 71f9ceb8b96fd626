"""Any module or callable as a network with the attributes of timm's.

`adopt` runs a network on two blank images and sets what timm's networks have: ``num_classes``,
``num_features`` and ``pretrained_cfg``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import to_2tuple
from torch import Tensor, nn

from ..data.model_input import input_spec_of
from ..errors import ConfigError, DataError, UserError
from ..messages import first_line
from .transformers_network import TransformersNetwork


class Called(nn.Module):
    """A callable that answers images with logits, or a file that is run: no parameters, no states.

    Its FLOPs are not counted: on the meta device it answers without being called.

    Args:
        call: gets images as its ``pretrained_cfg`` says, float32, on the device of the run; may
            answer with a tensor, an array or nested lists.
        name: its name in messages.
        sha256: of the file it comes from; it stands for its weights.
    """

    pretrained_cfg: dict[str, Any]

    num_classes = 0
    num_features = 0

    def __init__(self, call: Callable[[Tensor], Any], name: str, sha256: str = "") -> None:
        super().__init__()
        self.call, self.name, self.sha256 = call, name, sha256

    @torch.compiler.disable
    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C"]:
        if images.is_meta:
            return images.new_empty(len(images), self.num_classes)
        try:
            with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
                answer = torch.as_tensor(self.call(images.float())).to(images.device)
        except Exception as error:  # whatever somebody's code or service raises
            raise _cannot_answer(self.name, images.shape[1:], error) from error
        _check_answer(answer, len(images), self.name)
        return answer

    def __deepcopy__(self, memo: dict[int, Any]) -> "Called":
        return self  # it has no state, and a session or a client cannot be copied

    def get_extra_state(self) -> Tensor:
        """Return what stands for its weights."""
        return torch.tensor([*(self.sha256 or self.name).encode()], dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Leave it as it is: it has no weights to load."""


def adopt(
    network: Any, name: str, cfg: Mapping[str, Any] | None = None, size: Any = None
) -> nn.Module:
    """Return a module with the attributes of timm's: ``network``, or a module around it.

    Args:
        network: a module, or a callable; its own ``num_classes``, ``num_features`` and
            ``pretrained_cfg`` are kept.
        name: its name in messages.
        cfg: entries that override its own ``pretrained_cfg``.
        size: height and width of its images, or one number, pixels; None: its own, or 224.
    """
    model: Any = network
    if not isinstance(network, nn.Module):
        if not callable(network):
            what = f"{name} gives a {type(network).__name__}"
            raise ConfigError(what, "return an nn.Module, or a callable from images to logits")
        model = Called(network, name)
    known: dict[str, Any] = {"architecture": type(network).__name__}
    known |= {"fixed_input_size": True, "input_size": (3, 224, 224)}
    config = getattr(network, "config", None)
    is_transformers = isinstance(network, nn.Module) and hasattr(config, "model_type")
    if is_transformers and getattr(config, "image_size", None) is not None:
        known["input_size"] = (3, *to_2tuple(config.image_size))  # type: ignore[union-attr]
    known |= {**(getattr(network, "pretrained_cfg", None) or {}), **(cfg or {})}
    if size is not None:
        known["input_size"] = (3, *to_2tuple(size))
    if is_transformers:
        model = TransformersNetwork(network, known["input_size"][1:]).train(network.training)
    model.pretrained_cfg = known
    count = _count_answers(model, name, input_spec_of(model).image_size)
    if isinstance(model, Called) or not hasattr(model, "num_classes"):
        model.num_classes = count
    if model.num_classes not in (0, count):
        what = f"{name} has num_classes {model.num_classes}, and answers in {count}"
        raise ConfigError(what, "make them agree")
    if not hasattr(model, "num_features"):
        model.num_features = 0
    return model


def _count_answers(model: nn.Module, name: str, size: tuple[int, int]) -> int:
    """Run a network on two blank images, and return how many classes it answers in."""
    training = [module for module in model.modules() if module.training]
    weight = next(model.parameters(), torch.empty(0, device="cpu"))
    try:
        with weight.device, torch.no_grad(), torch.random.fork_rng(devices=[]):
            answer = model.eval()(torch.zeros(2, 3, *size, dtype=weight.dtype))
    except UserError:
        raise
    except Exception as error:  # whatever somebody's code raises
        raise _cannot_answer(name, (3, *size), error) from error
    finally:
        for module in training:
            module.training = True
    _check_answer(answer, 2, name)
    return int(answer.shape[1])


def _cannot_answer(name: str, size: Sequence[int], error: Exception) -> DataError:
    channels, height, width = size
    what = f"{name} cannot answer images of {channels} x {height} x {width}"
    return DataError(f"{what} ({type(error).__name__}: {first_line(error)})")


def _check_answer(answer: Any, count: int, name: str) -> None:
    """Raise `DataError` unless an answer to ``count`` images is that many rows of numbers."""
    if not isinstance(answer, Tensor):
        found = f"a {type(answer).__name__}"
    elif answer.ndim != 2 or len(answer) != count or not answer.is_floating_point():
        found = f"{answer.dtype} of {tuple(answer.shape)}"
    else:
        return
    raise DataError(f"{name} answers {count} images with {found}, not logits ({count}, classes)")
