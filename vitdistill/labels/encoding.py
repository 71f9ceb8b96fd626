"""How a teacher's answer becomes a record of fixed size, and records become the targets of a loss.

A record holds little-endian fields without padding. Logits are kept relative to their maximum,
never as probabilities: rounded probabilities can sum above 1, which leaves a negative rest. What a
sparse encoding leaves out (the tail) is measured in float64 on the true logits, once for every
temperature that will be asked for, because it cannot be known afterwards.

Shape letters: B records, C classes, K classes kept or drawn, L tokens, D width.

Source: the dense and top-k encodings are our own design, after TinyViT (arXiv 2207.10666,
wkcn/TinyViT@0389d51), which keeps float16 probabilities at temperature 1; sampling is RS-KD (arXiv
2503.16870).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ConfigError, DataError
from ..keyed import uniforms

Records: TypeAlias = np.ndarray  # of a layout's dtype

DENSE = ("uint8", "float16", "float32")  # by rising precision
SPARSE = ("topk", "sampled")
_MAX_CLASSES = 2**31
_LOWEST = -65504.0  # the lowest finite float16: logits further below the maximum are kept as this
_TEMPERATURES = (1e-3, 1e3)  # beyond, float16 and float32 hold nothing of use
_NOT_DRAWN = -1e4  # of logits / T: softmax gives exactly 0, and losses stay finite
_HIDDEN_DTYPES = {"float16": torch.float16, "float32": torch.float32}


class NonFinite(ValueError):
    """An answer holds NaN or infinity, or does not fit the number format it is to be stored in.

    Attributes:
        index: the first row of the batch that does.
    """

    def __init__(self, index: int, what: str) -> None:
        super().__init__(f"{what} in row {index}")
        self.index = index


@dataclass(frozen=True, kw_only=True)
class LogitEncoding:
    """How logits are stored.

    ``float32``: as they are, bit for bit. ``float16``: ``z - max z`` in float16 and the maximum in
    float32. ``uint8``: the nearest of 256 even steps from the smallest to the largest logit of the
    record; the error is half a step at most. ``topk``: the K largest and, for each temperature T,
    what the others weigh together; the distribution has the right values in the head and the right
    mass in the tail, which is spread evenly. ``sampled``: K classes drawn with replacement from
    ``softmax(z / T)``; unbiased over many records.

    Args:
        kind: one of the above.
        num_classes: C.
        k: topk: classes kept, at most C (a higher number is C); sampled: draws. 0 for dense
            encodings.
        temperatures: what the distribution can be asked for at. topk: at least one; sampled:
            exactly one; dense: none, any will do.

    Raises:
        ConfigError: settings that do not fit together.
    """

    kind: Literal["float32", "float16", "uint8", "topk", "sampled"]
    num_classes: int
    k: int = 0
    temperatures: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in DENSE + SPARSE:
            raise ConfigError(
                f"label encoding {self.kind!r} does not exist: choose one of"
                f" {', '.join(DENSE + SPARSE)}"
            )
        if not _is_count(self.num_classes) or self.num_classes > _MAX_CLASSES:
            raise ConfigError(
                f"num_classes of the label encoding is {self.num_classes!r}: give a whole number"
                f" from 1 to {_MAX_CLASSES}"
            )
        if not isinstance(self.temperatures, tuple) or not all(
            _is_temperature(t) for t in self.temperatures
        ):
            raise ConfigError(
                f"temperatures of the label encoding are {self.temperatures!r}: give a tuple of"
                " numbers from 0.001 to 1000"
            )
        temperatures = tuple(sorted({float(t) for t in self.temperatures}))
        if self.kind in DENSE:
            if self.k != 0 or temperatures:
                raise ConfigError(
                    f"the label encoding {self.kind} keeps every class at any temperature: leave k"
                    " and temperatures out"
                )
        else:
            if not _is_count(self.k) or self.k >= _MAX_CLASSES:
                raise ConfigError(
                    f"k of the label encoding {self.kind} is {self.k!r}: give a whole number"
                    " above 0"
                )
            if not temperatures:
                raise ConfigError(
                    f"the label encoding {self.kind} has to know the temperatures it will be read"
                    " at: give at least one"
                )
            if self.kind == "sampled" and len(temperatures) > 1:
                raise ConfigError(
                    f"classes are drawn at one temperature, not at {_listed(temperatures)}: give"
                    " one, or use topk"
                )
        # One way to write each encoding, so that equal stores have equal manifests.
        object.__setattr__(self, "temperatures", temperatures)
        object.__setattr__(
            self, "k", min(self.k, self.num_classes) if self.kind == "topk" else self.k
        )

    @property
    def is_complete(self) -> bool:
        """Whether every class has its own logit, so that any temperature can be asked for."""
        return self.kind in DENSE or (self.kind == "topk" and self.k == self.num_classes)

    def resolve(self, temperature: float | None) -> float:
        """The temperature that is meant: None is the only one there is (1 if every class is kept).

        Raises:
            ConfigError: the distribution at this temperature is not known.
        """
        if self.is_complete:
            return 1.0 if temperature is None else float(temperature)
        if temperature is None:
            if len(self.temperatures) > 1:
                raise ConfigError(
                    f"the stored labels are of several temperatures ({_listed(self.temperatures)}):"
                    " say which one is meant"
                )
            return self.temperatures[0]
        if temperature not in self.temperatures:
            raise ConfigError(
                f"the stored labels are of temperature {_listed(self.temperatures)}, not of"
                f" {temperature:g}: use a stored one, or label again with this temperature among"
                " temperatures"
            )
        return float(temperature)

    def fields(self) -> list[tuple[Any, ...]]:
        """The fields of a record that hold the logits, for `numpy.dtype`."""
        ids = "<u2" if self.num_classes <= 2**16 else "<u4"
        match self.kind:
            case "float32":
                return [("values", "<f4", (self.num_classes,))]
            case "float16":
                return [("top", "<f4"), ("values", "<f2", (self.num_classes,))]
            case "uint8":
                return [("low", "<f4"), ("step", "<f4"), ("values", "u1", (self.num_classes,))]
            case "topk":
                tails = [] if self.is_complete else [("tails", "<f4", (len(self.temperatures),))]
                return [("ids", ids, (self.k,)), ("values", "<f2", (self.k,)), *tails]
            case "sampled":
                return [("ids", ids, (self.k,))]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a record holds, field by field; all records of a store have the same size.

    Args:
        logits: how logits are stored; None: they are not.
        hidden: ``(block, tokens, width)`` of each stored hidden state, by rising block.
        features: ``(tokens, width)`` of the tokens after the final norm; None: they are not stored.
        hidden_dtype: the number format of hidden states and features.

    Raises:
        ConfigError: settings that do not fit together, or nothing to store.
    """

    logits: LogitEncoding | None = None
    hidden: tuple[tuple[int, int, int], ...] = ()
    features: tuple[int, int] | None = None
    hidden_dtype: Literal["float16", "float32"] = "float16"

    def __post_init__(self) -> None:
        if self.logits is None and not self.hidden and self.features is None:
            raise ConfigError(
                "a label store without logits, hidden states and features holds nothing: store at"
                " least one of them"
            )
        if self.hidden_dtype not in _HIDDEN_DTYPES:
            raise ConfigError(
                f"hidden_dtype of stored labels is {self.hidden_dtype!r}: choose float16 or float32"
            )
        if not isinstance(self.hidden, tuple) or not all(map(_is_state, self.hidden)):
            raise ConfigError(
                f"stored hidden states are {self.hidden!r}: give (block, tokens, width) of each"
            )
        blocks = [block for block, _, _ in self.hidden]
        if blocks != sorted(set(blocks)):
            raise ConfigError(
                f"hidden states are stored of blocks {blocks}: name each block once, in rising"
                " order"
            )
        if self.features is not None and not _is_shape(self.features):
            raise ConfigError(f"stored features are {self.features!r}: give (tokens, width)")

    @cached_property
    def dtype(self) -> np.dtype[np.void]:
        """A record as numpy reads it: little-endian, without padding; ``pixels`` is the first
        field.
        """
        fields: list[tuple[Any, ...]] = [("pixels", "<u4")]
        if self.logits is not None:
            fields += self.logits.fields()
        number = "<f2" if self.hidden_dtype == "float16" else "<f4"
        fields += [(name, number, shape) for name, shape in self._tokens().items()]
        return np.dtype(fields)

    @property
    def record_bytes(self) -> int:
        """Size of one record."""
        return self.dtype.itemsize

    def to_json(self) -> dict[str, Any]:
        """As plain JSON, which `from_json` reads."""
        logits = (
            None
            if self.logits is None
            else {**asdict(self.logits), "temperatures": list(self.logits.temperatures)}
        )
        return {
            "logits": logits,
            "hidden": [list(entry) for entry in self.hidden],
            "features": None if self.features is None else list(self.features),
            "hidden_dtype": self.hidden_dtype,
        }

    @classmethod
    def from_json(cls, written: Any) -> "Layout":
        """The layout that `to_json` wrote.

        Raises:
            DataError: this is not one.
        """
        try:
            logits, features = written["logits"], written["features"]
            if logits is not None:
                logits = LogitEncoding(**{**logits, "temperatures": tuple(logits["temperatures"])})
            hidden = tuple(tuple(entry) for entry in written["hidden"])
            rest = {
                name: value
                for name, value in written.items()
                if name not in ("logits", "hidden", "features")
            }
            layout = cls(
                logits=logits,
                hidden=hidden,
                features=None if features is None else tuple(features),
                **rest,
            )
            _ = layout.dtype  # numpy refuses records of 2 GiB
        except (
            ConfigError,
            AttributeError,
            KeyError,
            OverflowError,
            TypeError,
            ValueError,
        ) as error:
            raise DataError(
                f"the layout of a label store cannot be read ({error}): it is damaged, or of"
                " another version"
            ) from None
        return layout

    def encode(
        self,
        logits: Float[Tensor, "B C"] | None,
        hidden: Mapping[int, Float[Tensor, "B _ _"]],
        features: Float[Tensor, "B L D"] | None,
        pixels: npt.NDArray[np.uint32],
        keys: npt.NDArray[np.uint64],
    ) -> Records:
        """One record a row; what the layout does not ask for is not looked at.

        Equal answers give equal bytes: of equal logits, the smaller class comes first.

        Args:
            logits: the teacher's, of any temperature 1 and any floating-point format; taken as
                float32.
            hidden: block index to hidden states.
            features: tokens after the final norm.
            pixels: checksum of each view's pixels.
            keys: one a row, for the draws of ``sampled``.

        Raises:
            NonFinite: an answer is NaN or infinite, or a hidden state is beyond float16; ``index``
                is the first such row.
            ValueError: something is missing or of another shape than the layout says.
        """
        found = {
            "features": features,
            **{f"hidden_{block}": state for block, state in hidden.items()},
        }
        stored = {
            name: _of_shape(found.get(name), (len(pixels), *shape), name)
            for name, shape in self._tokens().items()
        }
        stored = {name: _narrow(value, self.hidden_dtype) for name, value in stored.items()}
        if self.logits is not None:
            true = _of_shape(logits, (len(pixels), self.logits.num_classes), "logits").float()
            _check_finite({"logits": true, **stored})
            stored |= _pack(self.logits, _double(true), keys)
        else:
            _check_finite(stored)
        return self._records(
            len(pixels),
            {"pixels": pixels} | {name: value.cpu().numpy() for name, value in stored.items()},
        )

    def targets(self, records: Records) -> "Targets":
        """The tensors of these records, on the CPU.

        Raises:
            DataError: a record names a class that does not exist.
        """
        self._check_records(records)
        fields = {name: _tensor(records[name]) for name in self.dtype.names or ()}
        if (
            self.logits is not None
            and "ids" in fields
            and bool((fields["ids"] >= self.logits.num_classes).any())
        ):
            raise DataError(
                f"a stored label names a class beyond the {self.logits.num_classes} there are: "
                "the label store is damaged, find the file with `vitdistill label verify`"
            )
        return Targets(self, fields)

    def prune(self, k: int) -> "Layout":
        """This layout with fewer classes kept (topk) or drawn (sampled).

        Raises:
            ConfigError: the encoding has no k, or a smaller one.
        """
        if self.logits is None or self.logits.kind not in SPARSE:
            raise ConfigError(
                f"only labels of the encodings {' and '.join(SPARSE)} have a k to lower: name"
                " another encoding instead"
            )
        if not _is_count(k) or k > self.logits.k:
            raise ConfigError(
                f"the stored labels have k {self.logits.k}, which cannot become {k!r}: give a"
                f" number from 1 to {self.logits.k}"
            )
        return replace(self, logits=replace(self.logits, k=k))

    def convert(self, records: Records, other: "Layout") -> Records:
        """These records in a smaller layout.

        Logits: topk to a lower k or fewer temperatures (what leaves the head joins the tail, in
        float64 from the stored values), sampled to fewer draws (the first ones), dense to topk and
        to dense encodings of less precision. Hidden states and features can be left out or become
        float16.

        Raises:
            ConfigError: ``other`` holds something that these records do not.
            NonFinite: a hidden state is beyond float16.
        """
        self.check_convertible(other)
        fields = self.targets(records).fields
        made = {name: _narrow(fields[name], other.hidden_dtype) for name in other._tokens()}
        _check_finite(made)
        if self.logits is not None and other.logits is not None:
            made |= _repack(self.logits, fields, other.logits)
        return other._records(
            len(records),
            {"pixels": records["pixels"]} | {name: value.numpy() for name, value in made.items()},
        )

    def check_convertible(self, other: "Layout") -> None:
        """Raises `ConfigError` where `convert` cannot make records of ``other`` from records of
        this layout.
        """
        if other.logits is not None:
            if self.logits is None:
                raise ConfigError(
                    "the label store holds no logits, which cannot be made from the rest: leave"
                    " them out"
                )
            _check_repack(self.logits, other.logits)
        have, want = self._tokens(), other._tokens()
        for name, shape in want.items():
            if have.get(name) != shape:
                raise ConfigError(
                    f"the label store has {name} of {have.get(name)}, not of {shape} (tokens,"
                    " width): keep it as it is, or leave it out"
                )
        if want and self.hidden_dtype == "float16" and other.hidden_dtype == "float32":
            raise ConfigError(
                "the stored hidden states are float16, and float32 would add nothing: leave"
                " hidden_dtype as it is"
            )

    def _tokens(self) -> dict[str, tuple[int, int]]:
        """Field name to (tokens, width) of hidden states and features."""
        states = {f"hidden_{block}": (tokens, width) for block, tokens, width in self.hidden}
        return states if self.features is None else {**states, "features": self.features}

    def _check_records(self, records: Records) -> None:
        if records.dtype != self.dtype or records.ndim != 1:
            raise ValueError(
                f"records of {records.ndim} dimensions and type {records.dtype} are not a batch of"
                f" {self.dtype}"
            )

    def _records(self, size: int, fields: Mapping[str, np.ndarray]) -> Records:
        records: Records = np.zeros(size, dtype=self.dtype)
        for name in self.dtype.names or ():
            records[name] = fields[name]
        return records


@dataclass(frozen=True, eq=False)
class Targets:
    """The stored answers of a batch, as tensors.

    Attributes:
        layout: what is stored.
        fields: the records' fields, as stored; floating-point numbers are widened when they are
            read.
    """

    layout: Layout
    fields: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Targets":
        """The same on ``device``."""
        return Targets(
            self.layout,
            {
                name: value.to(device, non_blocking=non_blocking)
                for name, value in self.fields.items()
            },
        )

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
        """Logits z in float32, all finite: ``softmax(z / T)`` is the stored distribution at
        temperature T.

        Dense encodings give the teacher's logits at any temperature. Sparse ones give, for a
        temperature they were written for, logits that have the right distribution at this
        temperature alone.

        Raises:
            ConfigError: no logits are stored, or not for this temperature.
        """
        encoding = self.layout.logits
        if encoding is None:
            raise ConfigError(
                "the label store holds no logits: label again with logits, or use objectives that"
                " read hidden states alone"
            )
        known = encoding.resolve(temperature)
        if encoding.kind in DENSE:
            return _dense(encoding, self.fields, torch.float32)
        if encoding.kind == "topk":
            return _top_logits(encoding, self.fields, known)
        return _drawn_logits(encoding, self.fields, known)


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_temperature(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and _TEMPERATURES[0] <= value <= _TEMPERATURES[1]
    )


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_count, value))


def _is_state(value: Any) -> bool:
    """Whether this is a block index and a shape."""
    return (
        isinstance(value, tuple)
        and len(value) == 3
        and _is_shape(value[1:])
        and _is_count(value[0], least=0)
    )


def _listed(temperatures: tuple[float, ...]) -> str:
    return " and ".join(f"{t:g}" for t in temperatures)


def _of_shape(value: Tensor | None, shape: tuple[int, ...], name: str) -> Tensor:
    if value is None or tuple(value.shape) != shape:
        given = "missing" if value is None else f"of shape {tuple(value.shape)}"
        raise ValueError(f"{name} are {given}, and the layout of the label store has {shape}")
    return value.detach()


def _narrow(value: Tensor, dtype: str) -> Tensor:
    return value.to(_HIDDEN_DTYPES[dtype])


def _check_finite(values: Mapping[str, Tensor]) -> None:
    """Raises `NonFinite` for the first row that holds NaN or infinity, in the number format it is
    stored in.
    """
    bad = []
    for name, value in values.items():
        rows = (~value.isfinite()).flatten(1).any(1)
        if bool(rows.any()):
            bad.append(
                (
                    int(rows.nonzero()[0]),
                    f"{name} are not finite numbers of {str(value.dtype).removeprefix('torch.')}",
                )
            )
    if bad:
        raise NonFinite(*min(bad))


def _double(logits: Tensor) -> Tensor:
    return (logits.cpu() if logits.device.type == "mps" else logits).double()


def _tensor(field: np.ndarray) -> Tensor:
    """A copy of a field that torch can compute with: unsigned numbers of more than 8 bits become
    int64.
    """
    wide = field.dtype.kind == "u" and field.dtype.itemsize > 1
    return torch.from_numpy(
        field.astype(np.int64 if wide else field.dtype.newbyteorder("="), order="C")
    )


def _pack(
    encoding: LogitEncoding, logits: Float[Tensor, "B C"], keys: npt.NDArray[np.uint64]
) -> dict[str, Tensor]:
    """The fields of these logits, which are in float64."""
    match encoding.kind:
        case "float32":
            return {"values": logits.float()}
        case "float16":
            top = logits.amax(1) + 0.0
            return {"top": top.float(), "values": _half(logits - top[:, None] + 0.0)}
        case "uint8":
            return _pack_steps(logits)
        case "topk":
            return _pack_top(encoding, logits)
        case "sampled":
            return {"ids": _draw(encoding, logits, keys)}


def _half(below: Tensor) -> Tensor:
    return below.clamp(min=_LOWEST).half()


def _pack_steps(logits: Float[Tensor, "B C"]) -> dict[str, Tensor]:
    low, high = (logits + 0.0).aminmax(dim=1)
    step = ((high - low) / 255).float()
    divisor = torch.where(step > 0, step, 1.0).double()
    values = ((logits - low[:, None]) / divisor[:, None]).round().clamp(0, 255)
    return {"low": low.float(), "step": step, "values": values.to(torch.uint8)}


def _pack_top(encoding: LogitEncoding, logits: Float[Tensor, "B C"]) -> dict[str, Tensor]:
    """The head and, where there is a tail, the log of its mass relative to the head's, both as
    float16 leaves the head.

    The head is rounded and the tail is not, so that the true log-sum would shift mass between them.
    What is kept is the true ratio of tail to head, times the rounded head: the tail's mass is then
    exact, whatever rounding did.
    """
    ids = _largest(logits, encoding.k)
    head = logits.gather(1, ids)
    top = head[:, :1]
    values = _half(head - top)
    if encoding.is_complete:
        return {"ids": ids, "values": values}
    below = logits - top
    rest = below.scatter(1, ids, -torch.inf)
    tails = []
    for t in encoding.temperatures:
        ratio = (rest / t).logsumexp(1) - ((head - top) / t).logsumexp(1)
        tails.append((ratio + (values.double() / t).logsumexp(1)).clamp(min=_LOWEST / t))
    return {"ids": ids, "values": values, "tails": torch.stack(tails, 1).float()}


def _largest(logits: Float[Tensor, "B C"], k: int) -> Int[Tensor, "B {k}"]:
    """Ids of the ``k`` largest, by falling logit; of equal ones the smaller id is first, which
    `torch.topk` does not promise.
    """
    bound = logits.topk(k, dim=1).values[:, -1:]
    chosen = logits >= bound
    if bool((chosen.sum(1) > k).any()):
        above, equal = logits > bound, logits == bound
        chosen = above | (
            equal & (equal.cumsum(1, dtype=torch.int32) <= k - above.sum(1, keepdim=True))
        )
    ids = chosen.nonzero()[:, 1].view(-1, k)
    order = logits.gather(1, ids).sort(dim=1, descending=True, stable=True).indices
    return ids.gather(1, order)


def _draw(
    encoding: LogitEncoding, logits: Float[Tensor, "B C"], keys: npt.NDArray[np.uint64]
) -> Int[Tensor, "B k"]:
    """Draws by the inverse of the cumulative distribution, on the CPU: cumulative sums differ from
    device to device.
    """
    logits = logits.cpu()
    summed = ((logits - logits.amax(1, keepdim=True)) / encoding.temperatures[0]).exp().cumsum(1)
    # At most 1 - 2**-53 times the sum, which is 1 at least: always below the sum, so that there is
    # a class.
    at = torch.from_numpy(uniforms(keys, encoding.k)) * summed[:, -1:]
    return torch.searchsorted(summed, at, right=True)


def _dense(
    encoding: LogitEncoding, fields: Mapping[str, Tensor], dtype: torch.dtype
) -> Float[Tensor, "B C"]:
    values = fields["values"].to(dtype)
    match encoding.kind:
        case "float16":
            return fields["top"].to(dtype)[:, None] + values
        case "uint8":
            return fields["low"].to(dtype)[:, None] + fields["step"].to(dtype)[:, None] * values
        case _:
            return values


def _top_logits(
    encoding: LogitEncoding, fields: Mapping[str, Tensor], temperature: float
) -> Float[Tensor, "B C"]:
    ids, values = fields["ids"], fields["values"].float()
    if encoding.is_complete:
        return torch.zeros_like(values).scatter_(1, ids, values)
    tail = fields["tails"][:, encoding.temperatures.index(temperature)] - math.log(
        encoding.num_classes - encoding.k
    )
    return (temperature * tail)[:, None].repeat(1, encoding.num_classes).scatter_(1, ids, values)


def _drawn_logits(
    encoding: LogitEncoding, fields: Mapping[str, Tensor], temperature: float
) -> Float[Tensor, "B C"]:
    ids = fields["ids"].sort(dim=1).values
    count = torch.searchsorted(ids, ids, right=True) - torch.searchsorted(ids, ids)
    nothing = torch.full(
        (len(ids), encoding.num_classes), temperature * _NOT_DRAWN, device=ids.device
    )
    return nothing.scatter_(1, ids, temperature * (count.float() / encoding.k).log())


def _check_repack(ours: LogitEncoding, other: LogitEncoding) -> None:
    """Raises `ConfigError` where logits of ``ours`` cannot become logits of ``other``."""
    if ours == other:
        return
    if ours.num_classes != other.num_classes:
        raise ConfigError(
            f"the stored labels are of {ours.num_classes} classes and cannot become"
            f" {other.num_classes}"
        )
    if ours.kind != other.kind and (ours.kind in SPARSE or other.kind == "sampled"):
        raise ConfigError(
            f"labels stored as {ours.kind} cannot become {other.kind}: label again with this"
            " encoding"
        )
    if other.kind in DENSE:
        if DENSE.index(other.kind) > DENSE.index(ours.kind):
            raise ConfigError(
                f"labels stored as {ours.kind} gain nothing as {other.kind}: keep them as they are"
            )
    elif ours.kind in SPARSE:
        if other.k > ours.k:
            raise ConfigError(
                f"the stored labels have k {ours.k}, which cannot become {other.k}: give a number"
                f" from 1 to {ours.k}"
            )
        for t in other.temperatures:
            ours.resolve(t)


def _repack(
    ours: LogitEncoding, fields: Mapping[str, Tensor], other: LogitEncoding
) -> dict[str, Tensor]:
    """The fields of ``other`` from those of ``ours``, where `_check_repack` has nothing against
    it.
    """
    if ours == other:
        return {field[0]: fields[field[0]] for field in ours.fields()}
    if ours.kind in DENSE:
        return _pack(other, _dense(ours, fields, torch.float64), np.zeros(0, np.uint64))
    kept = {"ids": fields["ids"][:, : other.k]}
    if ours.kind == "sampled":
        return kept
    kept["values"] = fields["values"][:, : other.k]
    if other.is_complete:
        return kept
    dropped = fields["values"][:, other.k :].double()
    tails = []
    for t in other.temperatures:
        tail = [(dropped / t).logsumexp(1)] if other.k < ours.k else []
        if not ours.is_complete:
            tail.append(fields["tails"][:, ours.temperatures.index(t)].double())
        tails.append(torch.stack(tail).logsumexp(0))
    return {**kept, "tails": torch.stack(tails, 1).float()}
