"""Networks of Hugging Face's transformers that timm does not have: run whole by their own code.

`TransformersNetwork` answers what the package asks of timm's networks: logits, and hidden states as
``forward_intermediates`` gives them.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from timm.layers import to_2tuple
from torch import Tensor, nn

from ..errors import ConfigError
from ..models.mae import patchify

NAME = "transformers/"
"""What the names of these networks begin with; their ``model_type`` follows."""


_HEAD = "ForImageClassification"


class Final(NamedTuple):
    """How a pass ended: the answer, and the tokens or the map behind the last norm."""

    logits: Tensor
    features: Tensor


class TransformersNetwork(nn.Module):
    """A network of transformers on images of (B, 3, H, W), normalised as it wants them.

    Without a classifier it answers with its pooled features.

    Args:
        network: a ``PreTrainedModel`` of images, its whole or its vision tower.
        image_size: height and width of its images, pixels.
    """

    def __init__(self, network: Any, image_size: Sequence[int]) -> None:
        super().__init__()
        self.network, config = network, network.config
        vision = getattr(config, "vision_config", config)
        self.kind = str(vision.model_type)
        self.patch_size = to_2tuple(getattr(vision, "patch_size", 1))
        own = getattr(vision, "image_size", None)
        # Positions of another size have to be asked for; some networks have none.
        self.resizes = own is not None and tuple(image_size) != to_2tuple(own)
        has_head = _HEAD in type(network).__name__
        self.num_classes = config.num_labels if has_head else 0
        with torch.no_grad():
            output = self._run(torch.zeros(1, 3, *image_size), True)
        states = self._states(output)
        widths = [state.shape[-1 if state.ndim == 3 else 1] for state in states]
        self.num_features = widths[-1]
        self.feature_info = [{"num_chs": x, "module": f"stage {i}"} for i, x in enumerate(widths)]
        self.num_prefix_tokens, self.cls_token = 0, None
        if states[-1].ndim == 3:
            rows, columns = self._grid(image_size)
            self.num_prefix_tokens = states[-1].shape[1] - rows * columns
        if self.num_prefix_tokens:  # the class token; only its presence matters
            self.cls_token = torch.empty(1, 1, self.num_features, device="meta")

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C"]:
        return self._answer(self._run(images, False))

    def forward_head(self, final: Final) -> Float[Tensor, "B C"]:
        return final.logits

    @torch.compiler.disable  # a hook that is registered later is not compiled in
    def forward_intermediates(
        self,
        images: Float[Tensor, "B 3 H W"],
        indices: Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        intermediates_only: bool = False,
    ) -> Any:
        """Return how a pass ended, and the maps (B, D, rows, columns) after blocks or stages.

        As timm's: with ``return_prefix_tokens`` each is a pair with the tokens before the patches.
        """
        ended: list[Any] = []
        tower = getattr(self.network, "vision_model", None) or self.network.base_model
        hook = tower.register_forward_hook(lambda module, args, output: ended.append(output))
        try:
            output = self._run(images, True)
        finally:
            hook.remove()
        states, grid = self._states(output), self._grid(images.shape[2:])
        count = self.num_prefix_tokens
        found: list[Any] = []
        for i in range(len(states)) if indices is None else indices:
            state, prefix = states[i], states[i][:, :0]
            if state.ndim == 3:
                prefix, patches = state[:, :count], state[:, count:]
                state = patches.transpose(1, 2).unflatten(2, grid)
            found.append((state, prefix) if return_prefix_tokens and count else state)
        if intermediates_only:
            return found
        ends = [end.last_hidden_state for end in (output, *ended) if "last_hidden_state" in end]
        return Final(self._answer(output), ends[0]), found

    def _grid(self, size: Sequence[int]) -> tuple[int, int]:
        return size[0] // self.patch_size[0], size[1] // self.patch_size[1]

    def _run(self, images: Tensor, states: bool) -> Any:
        given: dict[str, Any] = {"pixel_values": images}
        if self.kind == "siglip2_vision_model":  # patches in place of images
            rows, columns = self._grid(images.shape[2:])
            shape = torch.tensor([[rows, columns]], device=images.device).expand(len(images), 2)
            mask = images.new_ones(len(images), rows * columns, dtype=torch.int32)
            given = {"pixel_values": patchify(images, self.patch_size)}
            given |= {"spatial_shapes": shape, "pixel_attention_mask": mask}
        elif self.resizes:
            given["interpolate_pos_encoding"] = True
        return self.network(**given, output_hidden_states=states)

    def _states(self, output: Any) -> list[Tensor]:
        """Return the states after every block or stage: tokens, or maps with channels first."""
        states = output.get("reshaped_hidden_states") or output.hidden_states
        return [state.movedim(-1, 1) if self.kind == "hiera" else state for state in states[1:]]

    def _answer(self, output: Any) -> Tensor:
        if self.num_classes:
            return output.logits
        pooled = output.get("pooler_output")
        return output.last_hidden_state.mean(1) if pooled is None else pooled.flatten(1)


def build_transformers(
    config: Mapping[str, Any], num_classes: int | None, image_size: Sequence[int]
) -> TransformersNetwork:
    """Build a network of transformers from what its config.json holds, with random weights.

    ``num_classes``: None: as the config says; 0: none.
    """
    try:
        library = importlib.import_module("transformers")
    except ImportError as error:
        what = f"a network of model_type {config['model_type']} needs {error.name}"
        raise ConfigError(what, 'pip install "vitdistill[transformers]"') from error
    known = library.AutoConfig.for_model(**config)
    named = next(iter(config.get("architectures") or ()), "")
    has_head = _HEAD in named if num_classes is None else num_classes > 0
    if num_classes and num_classes != known.num_labels:
        known.num_labels = num_classes
    if not has_head:
        known, make = getattr(known, "vision_config", known), library.AutoModel.from_config
    elif _HEAD in named and hasattr(library, named):
        make = getattr(library, named)._from_config  # DeiT has two
    else:
        make = library.AutoModelForImageClassification.from_config
    return TransformersNetwork(make(known, dtype=torch.float32).eval(), image_size)


def checkpoint_filter_fn(
    state: Mapping[str, Tensor], model: TransformersNetwork
) -> dict[str, Tensor]:
    """Bring a published file under the names of this version of transformers; called as timm's."""
    network = model.network
    library = importlib.import_module("transformers")
    verbosity = library.logging.get_verbosity()
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    try:
        with torch.device("cpu"):
            loaded, report = type(network).from_pretrained(
                None,
                config=network.config,
                state_dict=dict(state),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    finally:
        library.logging.set_verbosity(verbosity)
    lost = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    return {f"network.{k}": v for k, v in loaded.state_dict().items() if k not in lost}
