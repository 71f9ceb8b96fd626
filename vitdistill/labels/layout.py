"""What a record of stored answers holds, and how records become the targets of a loss.

A record has a fixed size: little-endian fields without padding.

Shape letters: B records, C classes, L tokens, D width.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ConfigError
from ..keyed import I64
from .encoding import LogitEncoding

Records: TypeAlias = np.ndarray  # of a layout's dtype

_HIDDEN_DTYPES = {"float16": torch.float16, "float32": torch.float32}


class NonFinite(ValueError):
    """The answer in row ``index`` of a batch has numbers that its storage format lacks."""

    def __init__(self, index: int, what: str) -> None:
        super().__init__(f"{what} in row {index}")
        self.index = index


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a record holds, field by field; `ConfigError` if that is nothing.

    Args:
        hidden: ``(block, tokens, width)`` of each stored hidden state, by rising block.
        features: ``(tokens, width)`` of the tokens after the final norm.
        hidden_dtype: the number format of hidden states and features.
    """

    logits: LogitEncoding | None = None
    hidden: tuple[tuple[int, int, int], ...] = ()
    features: tuple[int, int] | None = None
    hidden_dtype: Literal["float16", "float32"] = "float16"

    def __post_init__(self) -> None:
        if self.logits is None and not self.hidden and self.features is None:
            raise ConfigError("labels without logits, hidden states and features hold nothing")
        blocks = [block for block, _, _ in self.hidden]
        if self.hidden_dtype not in _HIDDEN_DTYPES or blocks != sorted(set(blocks)):
            raise ValueError(self)

    @cached_property
    def dtype(self) -> np.dtype[np.void]:
        """A record as numpy reads it; ``pixels``, the checksum of the view, is the first field."""
        fields: list[tuple[Any, ...]] = [("pixels", "<u4")]
        if self.logits is not None:
            fields += self.logits.fields()
        number = "<f2" if self.hidden_dtype == "float16" else "<f4"
        fields += [(name, number, shape) for name, shape in self._tokens().items()]
        return np.dtype(fields)

    @property
    def record_bytes(self) -> int:
        return self.dtype.itemsize

    def describe(self) -> str:
        parts = [] if self.logits is None else [self.logits.describe()]
        for block, *size in self.hidden:
            parts.append("hidden states after block {} ({} x {})".format(block, *size))
        if self.features is not None:
            parts.append("features after the final norm ({} x {})".format(*self.features))
        in_what = f" in {self.hidden_dtype}" if self._tokens() else ""
        return ", ".join(parts) + in_what

    def to_json(self) -> dict[str, Any]:
        return dict(json.loads(json.dumps(asdict(self))))

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "Layout":
        logits, features = plain["logits"], plain["features"]
        if logits is not None:
            logits = LogitEncoding(**{**logits, "temperatures": tuple(logits["temperatures"])})
        return cls(
            logits=logits,
            hidden=tuple(tuple(entry) for entry in plain["hidden"]),
            features=None if features is None else tuple(features),
            hidden_dtype=plain["hidden_dtype"],
        )

    def encode(
        self,
        logits: Float[Tensor, "B C"] | None,
        hidden: Mapping[int, Float[Tensor, "B _ _"]],
        features: Float[Tensor, "B L D"] | None,
        pixels: npt.NDArray[np.uint32],
    ) -> Records:
        """Return one record a row; answers that the layout does not ask for are ignored.

        ``pixels`` are the checksums of the views. `NonFinite` if an answer is NaN or infinite, or a
        hidden state beyond float16.
        """
        given = {"features": features, **{f"hidden_{block}": x for block, x in hidden.items()}}
        dtype = _HIDDEN_DTYPES[self.hidden_dtype]
        fields = {
            name: _of_shape(given.get(name), (len(pixels), *shape), name).to(dtype)
            for name, shape in self._tokens().items()
        }
        _check_finite(fields)
        if self.logits is not None:
            true = _of_shape(logits, (len(pixels), self.logits.num_classes), "logits").float()
            _check_finite({"logits": true})
            fields |= self.logits.pack(true)
        return self._records(pixels, fields)

    def targets(self, records: Records, missing: I64 | None = None) -> "Targets":
        """Return the tensors of these records, on the CPU; ``missing`` are rows without one."""
        assert records.dtype == self.dtype and records.ndim == 1
        fields = {name: _tensor(records[name]) for name in self.dtype.names or ()}
        rows = torch.from_numpy(np.zeros(0, np.int64) if missing is None else missing)
        return Targets(self, fields, rows)

    def convert(self, records: Records, logits: LogitEncoding) -> Records:
        """Return the same answers as records of the layout `with_logits`."""
        other, fields = self.with_logits(logits), self.targets(records).fields
        assert self.logits is not None
        tokens = {name: fields[name] for name in self._tokens()}
        return other._records(records["pixels"], tokens | self.logits.repack(fields, logits))

    def with_logits(self, logits: LogitEncoding) -> "Layout":
        """Return this layout with another encoding of the same logits; may raise `ConfigError`."""
        if self.logits is None:
            raise ConfigError("the labels hold no logits to encode anew", field="encoding")
        self.logits.check_repack(logits)
        return replace(self, logits=logits)

    def _tokens(self) -> dict[str, tuple[int, int]]:
        """Map the fields of hidden states and features to (tokens, width)."""
        found = {f"hidden_{block}": (tokens, width) for block, tokens, width in self.hidden}
        return found if self.features is None else {**found, "features": self.features}

    def _records(self, pixels: npt.NDArray[np.uint32], fields: Mapping[str, Tensor]) -> Records:
        records: Records = np.zeros(len(pixels), dtype=self.dtype)
        records["pixels"] = pixels
        for name, value in fields.items():
            records[name] = value.cpu().numpy()
        return records


@dataclass(frozen=True, eq=False)
class Targets:
    """The stored answers of a batch, as tensors; ``missing`` are the rows that have no record."""

    layout: Layout
    fields: dict[str, Tensor]
    missing: Int[Tensor, " M"]

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Targets":
        moved = {name: x.to(device, non_blocking=non_blocking) for name, x in self.fields.items()}
        return Targets(self.layout, moved, self.missing.to(device, non_blocking=non_blocking))

    @property
    def pixels(self) -> Int[Tensor, " B"]:
        """Checksum of each view's pixels, 0 to 2**32 - 1 in int64."""
        return self.fields["pixels"]

    @property
    def hidden(self) -> dict[int, Float[Tensor, "B _ _"]]:
        """Block index to hidden states, in float32."""
        return {block: self.fields[f"hidden_{block}"].float() for block, _, _ in self.layout.hidden}

    @property
    def features(self) -> Float[Tensor, "B L D"] | None:
        """Tokens after the final norm, in float32, where they are stored."""
        return None if self.layout.features is None else self.fields["features"].float()

    def logits(self, temperature: float | None = None) -> Float[Tensor, "B C"]:
        """Return float32 logits z, all finite: ``softmax(z / T)`` is what the teacher said at T.

        With topk they are right only at the temperature asked for, which must be a stored one.
        """
        if self.layout.logits is None:
            raise ConfigError("the labels hold no logits", "label again with logits")
        return self.layout.logits.unpack(self.fields, temperature)


def _of_shape(value: Tensor | None, shape: tuple[int, ...], name: str) -> Tensor:
    if value is None or tuple(value.shape) != shape:
        given = "missing" if value is None else f"of shape {tuple(value.shape)}"
        raise ValueError(f"{name} are {given}, and the labels hold {shape}")
    return value.detach()


def _check_finite(values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        wrong = (~value.isfinite()).flatten(1).any(1)
        if bool(wrong.any()):
            dtype = str(value.dtype).removeprefix("torch.")
            raise NonFinite(int(wrong.nonzero()[0]), f"{name} are not finite numbers of {dtype}")


def _tensor(field: np.ndarray) -> Tensor:
    """Copy a field; unsigned numbers become int64, which torch computes with."""
    dtype = np.dtype(np.int64) if field.dtype.kind == "u" else field.dtype.newbyteorder("=")
    return torch.from_numpy(field.astype(dtype, order="C"))
