"""What to record in one forward pass."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Needs:
    """What to record in one forward pass; ``|`` unites the needs of several readers.

    Blocks are counted from 0; negative numbers count from the end.

    Args:
        logits: the model's prediction, and each head's own logits if it has several heads.
        hidden: blocks whose output (the residual stream, before the final norm) is recorded.
        attention: blocks whose class-token attention (post-softmax) is recorded.
        qkv: blocks whose queries, keys and values are recorded.
        features: the last block's output after the final norm, as timm's ``forward_features``.

    Example:
        >>> (Needs(logits=True) | Needs(hidden=frozenset({0}))) == Needs(True, frozenset({0}))
        True
    """

    logits: bool = False
    hidden: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()
    qkv: frozenset[int] = frozenset()
    features: bool = False

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(
            self.logits or other.logits,
            self.hidden | other.hidden,
            self.attention | other.attention,
            self.qkv | other.qkv,
            self.features or other.features,
        )

    def __bool__(self) -> bool:
        return self.logits or self.features or bool(self.hidden | self.attention | self.qkv)

    def resolve(self, depth: int) -> "Needs":
        """Return the same needs with blocks in ``0 .. depth-1``; raise `IndexError` beyond."""
        return Needs(
            self.logits,
            _absolute(self.hidden, depth),
            _absolute(self.attention, depth),
            _absolute(self.qkv, depth),
            self.features,
        )

    def num_blocks(self, depth: int) -> int:
        """Return how many of ``depth`` blocks have to run, counted from the first."""
        if self.logits or self.features:
            return depth
        needs = self.resolve(depth)
        return max(needs.hidden | needs.attention | needs.qkv, default=-1) + 1


# Not inside `resolve`: torch.compile of torch 2.10 cannot trace a nested function's annotations.
def _absolute(blocks: frozenset[int], depth: int) -> frozenset[int]:
    for block in blocks:
        if not -depth <= block < depth:
            raise IndexError(f"block {block} does not exist: the model has {depth}, counted from 0")
    return frozenset(block % depth for block in blocks)
