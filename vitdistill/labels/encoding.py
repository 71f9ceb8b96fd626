"""How a teacher's logits become the fields of a record, and the fields become logits again.

Logits are kept relative to their maximum, never as probabilities: rounded probabilities can sum to
more than 1, which leaves a negative rest. What ``topk`` leaves out (the tail) is measured on the
true logits in float64, for every temperature that will be asked for. Our own design, after TinyViT
(arXiv 2207.10666, wkcn/TinyViT@0389d51), which keeps float16 probabilities at temperature 1.

Shape letters: B records, C classes, K classes kept.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from ..errors import ConfigError, Give
from ..messages import suggest

KINDS = ("float32", "float16", "topk")
_LOWEST = -65504.0  # the lowest finite float16: logits further below the maximum are kept as this
_TEMPERATURES = (1e-3, 1e3)  # beyond, float16 and float32 hold nothing of use


@dataclass(frozen=True, kw_only=True)
class LogitEncoding:
    """How logits of C classes are stored.

    ``float32``: as they are, bit for bit. ``float16``: ``z - max z`` in float16 and the maximum in
    float32. ``topk``: the ``k`` largest and, for each of the ``temperatures`` T, the total weight
    of the others; the distribution at T has the right values in the head and the right mass in the
    tail, which is spread evenly.
    """

    kind: Literal["float32", "float16", "topk"]
    num_classes: int
    k: int = 0
    temperatures: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            what, fix = f"there is no label encoding {self.kind!r}", suggest(self.kind, KINDS)
            raise ConfigError(what, fix, field="encoding")
        if self.kind != "topk":
            if self.k or self.temperatures:
                what = f"k and temperatures cannot take effect with {self.kind} labels"
                raise ConfigError(what, Give("encoding", "topk"), field="encoding")
            return
        if self.k < 1:
            raise ConfigError(
                f"topk labels hold at least 1 class, not {self.k}", Give("k"), field="k"
            )
        low, high = _TEMPERATURES
        if not self.temperatures or not all(low <= t <= high for t in self.temperatures):
            what = f"temperatures of topk labels are {_spell(self.temperatures) or 'missing'}"
            raise ConfigError(what, f"give numbers from {low:g} to {high:g}", field="temperatures")
        # One way to write each encoding, so that equal stores have equal manifests.
        object.__setattr__(self, "k", min(self.k, self.num_classes))
        once = tuple(sorted({float(t) for t in self.temperatures}))
        object.__setattr__(self, "temperatures", once)

    @property
    def is_complete(self) -> bool:
        """Whether every class has its own logit, so that any temperature can be asked for."""
        return self.kind != "topk" or self.k == self.num_classes

    def describe(self) -> str:
        count = self.num_classes
        if self.kind == "float32":
            return f"{count} logits, exact"
        if self.kind == "float16":
            return f"{count} logits in float16"
        if self.is_complete:
            return f"all {count} logits in float16, largest first"
        at = ", ".join(f"{t:g}" for t in self.temperatures)
        return f"the {self.k} largest of {count} logits and the mass of the others at T = {at}"

    def resolve(self, temperature: float | None) -> float:
        """Return the temperature meant (None: the only one); `ConfigError` if it is not stored."""
        if self.is_complete:
            return 1.0 if temperature is None else float(temperature)
        if temperature is None and len(self.temperatures) == 1:
            return self.temperatures[0]
        if temperature not in self.temperatures:
            raise ConfigError(
                f"the stored labels are valid only at temperature {_spell(self.temperatures)}, and"
                f" {'none' if temperature is None else f'{temperature:g}'} is asked for",
                ("ask for a stored temperature", "label again at the one you need"),
                field="temperatures",
            )
        return float(temperature)

    def fields(self) -> list[tuple[Any, ...]]:
        """Return the fields of a record that hold the logits, for `numpy.dtype`."""
        if self.kind == "float32":
            return [("values", "<f4", (self.num_classes,))]
        if self.kind == "float16":
            return [("top", "<f4"), ("values", "<f2", (self.num_classes,))]
        ids = "<u2" if self.num_classes <= 2**16 else "<u4"
        tails = [] if self.is_complete else [("tails", "<f4", (len(self.temperatures),))]
        return [("ids", ids, (self.k,)), ("values", "<f2", (self.k,)), *tails]

    def pack(self, logits: Float[Tensor, "B C"]) -> dict[str, Tensor]:
        """Return the fields of finite logits; equal logits give equal bytes."""
        if self.kind == "float32":
            return {"values": logits.float()}
        logits = logits.double()
        if self.kind == "float16":
            top = logits.amax(1) + 0.0  # + 0.0: no negative zeros, which have other bytes
            return {"top": top.float(), "values": _half(logits - top[:, None] + 0.0)}
        return self._pack_top(logits)

    def _pack_top(self, logits: Float64[Tensor, "B C"]) -> dict[str, Tensor]:
        """Return the head in float16 and the log of the tail's mass relative to its maximum."""
        ids = _largest(logits, self.k)
        head = logits.gather(1, ids)
        top = head[:, :1]
        values = _half(head - top)
        if self.is_complete:
            return {"ids": ids, "values": values}
        rest = (logits - top).scatter(1, ids, -torch.inf)
        tails = []
        # The head is rounded and the tail is not, so storing the true log-sum would shift mass
        # between them. Store the true ratio of tail to head times the rounded head instead: the
        # tail's mass is then exact, whatever rounding did.
        for t in self.temperatures:
            ratio = (rest / t).logsumexp(1) - ((head - top) / t).logsumexp(1)
            tails.append((ratio + (values.double() / t).logsumexp(1)).clamp(min=_LOWEST / t))
        return {"ids": ids, "values": values, "tails": torch.stack(tails, 1).float()}

    def unpack(
        self, fields: Mapping[str, Tensor], temperature: float | None
    ) -> Float[Tensor, "B C"]:
        """Return float32 logits z such that ``softmax(z / T)`` is the distribution stored for T."""
        known = self.resolve(temperature)
        if self.kind != "topk":
            return self._dense(fields, torch.float32)
        ids, values = fields["ids"], fields["values"].float()
        if self.is_complete:
            return torch.zeros_like(values).scatter_(1, ids, values)
        tail = fields["tails"][:, self.temperatures.index(known)]
        each = known * (tail - math.log(self.num_classes - self.k))
        return each[:, None].repeat(1, self.num_classes).scatter_(1, ids, values)

    def _dense(self, fields: Mapping[str, Tensor], dtype: torch.dtype) -> Float[Tensor, "B C"]:
        values = fields["values"].to(dtype)
        return values if self.kind == "float32" else fields["top"].to(dtype)[:, None] + values

    def check_repack(self, other: "LogitEncoding") -> None:
        """Raise `ConfigError` where stored logits cannot become logits of ``other``."""
        assert self.num_classes == other.num_classes
        if other == self:
            return
        if other.kind != "topk" and (self.kind, other.kind) != ("float32", "float16"):
            what = f"labels stored as {self.kind} gain nothing as {other.kind}"
            raise ConfigError(what, "keep them as they are", field="encoding")
        if self.kind == "topk":
            if other.k > self.k:
                what = f"the stored labels hold {self.k} classes an image, not {other.k}"
                raise ConfigError(what, Give("k", self.k), field="k")
            for t in other.temperatures:
                self.resolve(t)

    def repack(self, fields: Mapping[str, Tensor], other: "LogitEncoding") -> dict[str, Tensor]:
        """Return the fields of ``other`` from stored ones, where `check_repack` raises nothing."""
        if self == other:
            return {field[0]: fields[field[0]] for field in self.fields()}
        if self.kind != "topk":
            return other.pack(self._dense(fields, torch.float64))
        kept = {name: fields[name][:, : other.k] for name in ("ids", "values")}
        if other.is_complete:
            return kept
        # What leaves the head joins the tail, in float64 from the stored values.
        dropped = fields["values"][:, other.k :].double()
        tails = []
        for t in other.temperatures:
            tail = [(dropped / t).logsumexp(1)] if other.k < self.k else []
            if not self.is_complete:
                tail.append(fields["tails"][:, self.temperatures.index(t)].double())
            tails.append(torch.stack(tail).logsumexp(0))
        return {**kept, "tails": torch.stack(tails, 1).float()}


def _spell(temperatures: tuple[float, ...]) -> str:
    """Write temperatures: ``1 and 4``."""
    return " and ".join(f"{t:g}" for t in temperatures)


def _half(below: Float64[Tensor, "..."]) -> Tensor:
    return below.clamp(min=_LOWEST).half()


def _largest(logits: Float[Tensor, "B C"], k: int) -> Int[Tensor, "B {k}"]:
    """Return the classes of the ``k`` largest logits, by falling logit.

    Of equal logits the smaller class comes first, which `torch.topk` does not promise.
    """
    return logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
