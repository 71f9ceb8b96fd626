"""Flags as dataclasses: tyro prints the help and fills them; a mistake is answered here, in one
sentence with a suggestion.
"""

import dataclasses
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from ..errors import ConfigError, UserError
from ..recipes.convert import convert

Flags = TypeVar("Flags")

ELSEWHERE: dict[str, str] = {
    "--accum-iter": "write --accumulate",
    "--amp": "write --amp-dtype bfloat16, which is the default on a GPU",
    "--aug-repeats": "write --repeated-aug",
    "--blr": "write --lr, which is not scaled: blr x batch size / 256",
    "--checkpoint-hist": "write --set train.keep_checkpoints=2",
    "--data-path": "write --data-dir",
    "--data-set": "write --data-dir, a folder or torchvision/CIFAR10?root=DIR",
    "--distillation-type": "the recipe says it, kd for soft, hard_kd for hard and alone for none",
    "--eval": "write vitdistill eval RUN --data-dir FOLDER",
    "--finetune": "write --model-path FILE",
    "--global-pool": "write --set student.model_args.global_pool=avg",
    "--initial-checkpoint": "write --model-path FILE",
    "--input-size": "write --img-size",
    "--log-dir": "curves are written into the run's folder, --output",
    "--log-interval": "write --log-every",
    "--mask-ratio": "write --set masking.mask_rate=0.75",
    "--mixup-prob": "write --set data.augment.mixup_prob=0.5",
    "--mixup-switch-prob": "write --set data.augment.mixup_switch_prob=0.5",
    "--model-ema": "write --model-ema-decay 0.9998",
    "--model-kwargs": "write --set student.model_args.depth=6 and the like",
    "--nb-classes": "the classes are those of the images",
    "--no-repeated-aug": "write --repeated-aug 1",
    "--norm-pix-loss": "write --set objectives.mae.norm_pix=true",
    "--num-classes": "the classes are those of the images",
    "--num-workers": "write --workers",
    "--opt-betas": "write --set optim.opt_args.betas=[0.9,0.95]",
    "--opt-eps": "write --set optim.opt_args.eps=1e-8",
    "--output-dir": "write --output",
    "--ratio": "write --set data.augment.ratio=[0.75,1.33]",
    "--resume": "the same command goes on with the run in its --output",
    "--scale": "write --set data.augment.scale=[0.08,1]",
    "--start-epoch": "the same command goes on with the run in its --output",
    "--train-interpolation": "write --set data.augment.interpolation=bicubic",
    "--unscale-lr": "leave it out, --lr is never scaled",
    "--warmup-prefix": "write --set optim.warmup_prefix=true",
}
"""Flags of timm's, DeiT's and MAE's scripts that are not flags here, and what to write instead."""


@dataclass(frozen=True, kw_only=True)
class Value(PrimitiveConstructorSpec[Any]):
    """How a flag's one value is read and shown; ``none`` is None."""

    kind: Any


def _value(kind: Any, metavar: str) -> Value:
    return Value(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read_value(words[0], kind, "the value"),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [value if isinstance(value, str) else str(value).lower()],
        kind=kind,
    )


TEXT = _value(str, "TEXT")
NUMBER = _value(float, "NUMBER")
COUNT = _value(int, "N")
SWITCH = _value(bool, "[true|false]")


def one_of(*choices: str) -> Value:
    """A value that is one of a few words."""
    return _value(Literal[choices], "|".join(choices))


def read_value(word: str, kind: Any, name: str, optional: bool = True) -> Any:
    """The value of type ``kind`` (a type, or a Literal) that ``word`` spells; raises `UserError`
    naming ``name``.
    """
    if optional and word.lower() in ("none", "null") and "none" not in get_args(kind):
        return None
    value = {"true": True, "false": False}.get(word.lower(), word) if kind is bool else word
    try:
        return convert(value, kind, name)
    except ConfigError as error:
        raise UserError(str(error)) from None


def about(text: str, name: str | None = None, metavar: str | None = None) -> Any:
    """A flag's help."""
    return arg(name=name, metavar=metavar, help=text, help_behavior_hint=_default_hint)


def _default_hint(default: str) -> str:
    return "" if default in ("''", "") else f"(default: {default})"


@dataclass(frozen=True)
class _Flag:
    """One flag as the command line spells it, or a word of its own (``metadata={"positional":
    METAVAR}``).
    """

    name: str
    field: "dataclasses.Field[Any]"
    value: Value | None
    optional: bool
    aliases: tuple[str, ...]

    @classmethod
    def of(cls, item: "dataclasses.Field[Any]", hint: Any) -> "_Flag":
        name = item.metadata.get("positional") or "--" + item.name.rstrip("_").replace("_", "-")
        value = next(
            (extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Value)), None
        )
        return cls(
            name,
            item,
            value,
            type(None) in get_args(get_args(hint)[0]),
            item.metadata.get("aliases", ()),
        )

    @property
    def positional(self) -> bool:
        return not self.name.startswith("-")

    @property
    def many(self) -> bool:
        return self.field.default == ()

    @property
    def required(self) -> bool:
        return self.field.default is MISSING and self.field.default_factory is MISSING


def flags_of(flags: type) -> Iterator[_Flag]:
    """Every flag of a dataclass, those of nested groups included."""
    hints = get_type_hints(flags, include_extras=True)
    for item in dataclasses.fields(flags):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            yield from flags_of(hint)  # type: ignore[arg-type]
        else:
            yield _Flag.of(item, hint)


def normalise(flags: type, words: Sequence[str], prog: str) -> dict[str, list[str]]:
    """The words after each flag by its field's name: aliases resolved, ``--a=b`` split, a list
    given twice joined.

    Raises:
        UserError: a flag that does not exist, is given twice, lacks its value or has one of the
            wrong type.
    """
    known = {spelling: flag for flag in flags_of(flags) for spelling in (flag.name, *flag.aliases)}
    given: dict[str, list[str]] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not _is_flag(word):
            flag = next(
                (
                    flag
                    for flag in known.values()
                    if flag.positional and flag.field.name not in given
                ),
                None,
            )
            if flag is None:
                raise UserError(
                    f"{word!r} is not expected here: flags begin with --, and '{prog} --help' lists"
                    " them"
                )
            given[flag.field.name] = [word]
            continue
        spelling, equals, value = word.partition("=")
        flag = _find(spelling, known, prog)
        if flag.field.name in given and not flag.many:
            raise UserError(f"{flag.name} is given twice: give it once")
        if equals:
            items = [value]
        elif flag.many:
            count = next((i for i, item in enumerate(rest) if _is_flag(item)), len(rest))
            items, rest = rest[:count], rest[count:]
        else:
            items = [rest.pop(0)] if _takes(flag, rest) else []
        given[flag.field.name] = given.get(flag.field.name, []) + _checked(flag, items)
    missing = next(
        (flag for flag in known.values() if flag.required and flag.field.name not in given), None
    )
    if missing is not None:
        raise UserError(f"{missing.name} is missing: '{prog} --help' says what it is")
    return given


def _is_flag(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return word.startswith("-") and word != "-"
    return False


def _find(spelling: str, known: dict[str, _Flag], prog: str) -> _Flag:
    plain = spelling.replace("_", "-")
    if plain in known:
        return known[plain]
    advice = ELSEWHERE.get(plain)
    if advice is not None and all(flag in known for flag in re.findall(r"--[\w-]+", advice)):
        raise UserError(f"there is no flag {spelling}: {advice}")
    close = get_close_matches(plain, [name for name in known if name.startswith("--")], n=1)
    raise UserError(
        f"there is no flag {spelling}: "
        + (f"did you mean {close[0]}?" if close else f"'{prog} --help' lists them")
    )


def _takes(flag: _Flag, rest: list[str]) -> bool:
    """Whether the next word is the value of ``flag``; a switch that can also be taken back has one
    only if that is true or false.
    """
    if flag.value is None or not rest or _is_flag(rest[0]):
        return False
    return flag.value.kind is not bool or rest[0].lower() in ("true", "false", "none")


def _checked(flag: _Flag, items: list[str]) -> list[str]:
    if flag.value is None and not flag.many:
        if items:
            raise UserError(f"{flag.name} takes no value: write it alone")
        return items
    if not items and flag.value is not None and flag.value.kind is bool:
        return ["true"]
    if not items:
        kind = (
            f" ({flag.value.metavar})"
            if flag.value is not None and get_origin(flag.value.kind) is Literal
            else ""
        )
        raise UserError(f"{flag.name} needs a value{kind}")
    if flag.value is not None:
        read_value(items[0], flag.value.kind, flag.name, flag.optional)
    return items


def parse_flags(flags: type[Flags], words: Sequence[str], prog: str, description: str) -> Flags:
    """The flags filled in; ``--help`` prints the help and exits.

    Raises:
        UserError: one sentence for any mistake.
        SystemExit: after the help.
    """
    return fill(
        flags, None if asks_help(words) else normalise(flags, words, prog), prog, description
    )


def asks_help(words: Sequence[str]) -> bool:
    """Whether the words ask for help, whatever else they say."""
    return "--help" in words or "-h" in words


def fill(
    flags: type[Flags],
    given: dict[str, list[str]] | None,
    prog: str,
    description: str,
    default: Flags | None = None,
) -> Flags:
    """The dataclass with what `normalise` read in it; None prints the help and exits."""
    words = ["--help"]
    if given is not None:
        names = {flag.field.name: flag for flag in flags_of(flags)}
        words = [
            word
            for key, items in given.items()
            for word in ([] if names[key].positional else [names[key].name]) + items
        ]
    options: dict[str, Any] = {} if default is None else {"default": default}
    filled: Flags = tyro.cli(
        flags,
        args=words,
        prog=prog,
        description=description + _aliases(flags),
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
        **options,
    )
    return filled


def _aliases(flags: type) -> str:
    pairs = [f"{alias} for {flag.name}" for flag in flags_of(flags) for alias in flag.aliases]
    return "\n\n" + wrap("Also understood: " + ", ".join(pairs) + ".") if pairs else ""


def wrap(text: str, indent: str = "  ") -> str:
    """Lines no wider than the terminal, the second and later ones indented (tyro joins lines that
    begin with a letter).
    """
    width = max(shutil.get_terminal_size().columns - 2, 40)  # some versions of tyro keep a margin
    return textwrap.fill(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
