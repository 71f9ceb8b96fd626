"""What is known of a network before it runs."""

from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from .families import family_of


@dataclass(frozen=True)
class Network:
    """What the plan knows of a network before it runs.

    Attributes:
        name: how messages call it ("student", or the teacher's name).
        architecture: timm name or class name.
        image_size: height and width of its input, pixels.
        depth: blocks; dim: width; num_classes: size of its answer (after classes are matched).
        dims: width after each block; empty: hidden states cannot be recorded.
        num_parameters: all of them.
        grid: rows and columns of patches; (0, 0) for networks without.
        patch_size: pixels; (0, 0) for networks without.
        num_prefix_tokens: class, distillation and register tokens.
        has_class_token: the first of them stands for the whole image.
        reads_class_token: its prediction is made of that, and not of a pool of its patches alone.
        heads: classifier heads by name; answering: those that the prediction is made of, empty for
            all.
        walks: can be run on a subset of patches.
        attention_source: see `vitdistill.vit.families.Family`; None: no attention to read.
        num_heads: attention heads a block; 0: no attention to read.
        final_norm: the last block's output is normed token by token, as `Needs.features` has it,
            and not only after pooling.
        grids: rows and columns of its feature maps by block, where its answers are stored and it
            does not walk.
        flops: of one forward pass on one image, where its answers are stored; 0: not known.
    """

    name: str
    architecture: str
    image_size: tuple[int, int]
    depth: int
    dim: int
    num_classes: int
    num_parameters: int
    grid: tuple[int, int] = (0, 0)
    patch_size: tuple[int, int] = (0, 0)
    num_prefix_tokens: int = 0
    has_class_token: bool = False
    heads: tuple[str, ...] = ("class",)
    answering: tuple[str, ...] = ()
    walks: bool = False
    attention_source: Literal["class", "pool", "mean"] | None = None
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

    @classmethod
    def of(
        cls,
        model: nn.Module,
        name: str,
        architecture: str,
        image_size: tuple[int, int],
        num_classes: int | None = None,
    ) -> "Network":
        """Describe ``model``; ``num_classes`` overrides the head's own when answers are matched to
        fewer classes.
        """
        import torch

        family = family_of(model)
        grid, patch = (0, 0), (0, 0)
        if family.walks:
            grid = family.grid(torch.empty(0, 3, *image_size, device="meta"))
            height, width = model.patch_embed.patch_size  # type: ignore[union-attr, misc]
            patch = (int(height), int(width))
        classes = num_classes if num_classes is not None else int(getattr(model, "num_classes", 0))
        return cls(
            name=name,
            architecture=architecture,
            image_size=image_size,
            depth=family.depth,
            dim=family.dim,
            num_classes=classes,
            num_parameters=sum(p.numel() for p in model.parameters()),
            grid=grid,
            patch_size=patch,
            num_prefix_tokens=family.num_prefix_tokens,
            has_class_token=family.has_class_token,
            heads=family.heads,
            answering=family.answering,
            walks=family.walks,
            attention_source=family.attention_source,
            dims=family.dims,
            num_heads=family.num_heads,
            final_norm=not isinstance(getattr(model, "norm", None), nn.Identity),
            reads_class_token=family.reads_class_token,
        )
