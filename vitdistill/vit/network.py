"""What is known of a network before it runs."""

from dataclasses import dataclass, field
from typing import Literal

AttentionSource = Literal["class", "pool", "mean"]


@dataclass(frozen=True)
class Network:
    """The description of a network, made by its family (`vitdistill.vit.describe_network`).

    Attributes:
        name: how messages call it: ``student``, or the teacher's name.
        architecture: timm name or class name.
        image_size: height and width of its input, pixels.
        depth: blocks, or feature stages of a network that is run whole.
        dim: width of the token stream.
        num_classes: size of its answer, after classes are matched.
        num_parameters: all of them; 0 in the record of a pass.
        grid: rows and columns of patches; (0, 0) without patches.
        patch_size: height and width of a patch, pixels; (0, 0) without patches.
        num_prefix_tokens: class, distillation and register tokens, which precede the patches.
        has_class_token: the first token stands for the whole image.
        heads: classifier heads by name; several only with distillation or teacher tokens.
        answering: the heads the prediction is made of; empty: all.
        walks: `run_vit` can walk it block by block, on any subset of patches.
        attention_source: what stands for class-token attention. ``class``: the class token's row.
            ``pool``: the query of an attention pool (last block; ``mean`` in others). ``mean``: the
            mean of all rows, how much attention a patch receives. None: it cannot be recorded.
        dims: width after each block; empty: hidden states cannot be recorded.
        num_heads: attention heads a block; 0: attention cannot be recorded.
        final_norm: features are recorded as they are pooled; False: they are normed after that.
        grids: rows and columns of feature maps by block, for stored answers.
        flops: of one forward pass on one image, for stored answers; 0: unknown.
        reads_class_token: the prediction reads the class token, not a pool of the patches alone.
    """

    name: str = ""
    architecture: str = ""
    image_size: tuple[int, int] = (0, 0)
    depth: int = 0
    dim: int = 0
    num_classes: int = 0
    num_parameters: int = 0
    grid: tuple[int, int] = (0, 0)
    patch_size: tuple[int, int] = (0, 0)
    num_prefix_tokens: int = 0
    has_class_token: bool = False
    heads: tuple[str, ...] = ("class",)
    answering: tuple[str, ...] = ()
    walks: bool = False
    attention_source: AttentionSource | None = None
    dims: tuple[int, ...] = ()
    num_heads: int = 0
    final_norm: bool = True
    grids: dict[int, tuple[int, int]] = field(default_factory=dict, compare=False)
    flops: int = 0
    reads_class_token: bool = True

    @property
    def num_patches(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]
