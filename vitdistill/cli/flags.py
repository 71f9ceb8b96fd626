"""One parser for every command: argparse, made from options.

A mistake is answered in one sentence with what to write instead, and before torch is imported.
"""

import argparse
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from types import UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import ConfigError, UserError
from ..messages import printable, suggest
from ..option import Option, convert_scalar, options_of

Arguments = TypeVar("Arguments")

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


@dataclass(frozen=True)
class Flag:
    """A flag, or a word of its own, as the command line takes it.

    Args:
        dest: the field of the arguments that it fills, or a path of the recipe.
        kind: the type of its value.
        option: its description.
        required: it has no default.
    """

    dest: str
    kind: Any
    option: Option
    required: bool = False

    @property
    def name(self) -> str:
        return self.option.flag

    @property
    def spellings(self) -> tuple[str, ...]:
        return (self.name, *self.option.aliases)

    @property
    def positional(self) -> bool:
        return not self.name.startswith("-")

    @property
    def many(self) -> bool:
        return get_origin(self.kind) is tuple

    @property
    def value_kind(self) -> Any:
        """The type of one value."""
        args = [arg for arg in get_args(self.kind) if arg not in (type(None), ...)]
        return args[0] if get_origin(self.kind) in (Union, UnionType, tuple) else self.kind

    @property
    def optional(self) -> bool:
        return type(None) in get_args(self.kind)

    @property
    def alone(self) -> str:
        """What it means without a value; empty: it needs one."""
        return self.option.alone or ("true" if self.value_kind is bool else "")

    @property
    def metavar(self) -> str:
        """What stands for its value in the help."""
        kind = self.value_kind
        if self.option.metavar or self.positional:
            return self.option.metavar or self.name
        if get_origin(kind) is Literal:
            return "|".join(get_args(kind))
        return {int: "N", float: "NUMBER", bool: ""}.get(kind, "TEXT")

    def read(self, word: str) -> Any:
        """Return the value that ``word`` spells; raises `UserError` naming the flag."""
        kind, choices = self.value_kind, get_args(self.value_kind)
        if self.optional and word.lower() in ("none", "null") and "none" not in choices:
            return None
        if get_origin(kind) is Literal:
            if word not in choices:
                raise UserError(f"{self.name} is {printable(word)!r}", suggest(word, choices))
            return word
        value = {"true": True, "false": False}.get(word.lower(), word) if kind is bool else word
        try:
            number = convert_scalar(value, kind, self.name)
        except ConfigError as error:
            raise UserError(error.what, error.fixes) from None
        bounds = self.option.describe_bounds()
        if bounds and not self.option.allows(number):
            raise ConfigError(f"{self.name} is {number!r}", f"give {bounds}", field=self.dest)
        return number


def flags_of(arguments: type) -> Iterator[Flag]:
    """Yield the flags that fill a dataclass of options."""
    hints, described = get_type_hints(arguments), options_of(arguments)
    for item in fields(arguments):
        if item.name in described:
            required = item.default is MISSING and item.default_factory is MISSING
            yield Flag(item.name, hints[item.name], described[item.name], required)


Groups = Mapping[str, Sequence[Flag]]
"""Flags by the heading they stand under in the help."""


def parse_words(groups: Groups, words: Sequence[str], prog: str) -> dict[str, Any]:
    """Return the values that the words give, by the flags' ``dest``.

    Raises:
        UserError: a flag does not exist, is given twice, lacks its value or has a wrong one.
    """
    known = {s: flag for flags in groups.values() for flag in flags for s in flag.spellings}
    spelled = _spell_out(words, known, prog)
    found = vars(_make_parser(groups, prog).parse_intermixed_args(spelled))
    absent = {f.dest for flags in groups.values() for f in flags if f.positional and not f.required}
    return {key: value for key, value in found.items() if value is not None or key not in absent}


def _is_flag(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return word.startswith("-") and word != "-"
    return False


def _spell_out(words: Sequence[str], known: Mapping[str, Flag], prog: str) -> list[str]:
    """Return the words with each flag in its own spelling, and a value after one that can stand
    alone.
    """
    spelled = []
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if not _is_flag(word):
            spelled.append(word)
            continue
        name, equals, value = word.partition("=")
        flag = known.get(name.replace("_", "-"))
        if flag is None:
            raise _unknown(name, known, prog)
        if not equals and flag.alone and not _reads(flag, following):
            spelled.append(f"{flag.name}={flag.alone}")
        else:
            spelled.append(flag.name + equals + value)
    return spelled


def _reads(flag: Flag, word: str) -> bool:
    try:
        flag.read(word)
    except ConfigError:  # it is a value, out of bounds
        return True
    except UserError:
        return False
    return True


def _unknown(name: str, known: Mapping[str, Flag], prog: str) -> UserError:
    plain = name.replace("_", "-")
    advice = ELSEWHERE.get(plain, "")
    if not all(flag in known for flag in re.findall(r"--[\w-]+", advice)):
        advice = ""
    names = [spelling for spelling in known if spelling.startswith("--")]
    hint = advice or suggest(plain, names, f"'{prog} --help' lists them").replace("'--", "--")
    return UserError(f"there is no flag {printable(name)}", hint.replace("'?", "?"))


# --- argparse ------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        what = message.removeprefix("argument ")
        raise UserError(printable(what), f"'{self.prog} --help' says more")


class _Once(argparse.Action):
    """Store a value, and refuse a second."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        if hasattr(namespace, self.dest):
            raise UserError(f"{self.option_strings[0]} is given twice", "give it once")
        setattr(namespace, self.dest, values)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """A flag, its short form and its value on one line; aliases stand at the end of the page."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = action.option_strings[0] if action.option_strings else ""
        return f"{name} {action.metavar}".strip()


def _make_parser(
    groups: Groups, prog: str, about: str = "", defaults: Mapping[str, Any] | None = None
) -> argparse.ArgumentParser:
    words = [flag.metavar for flags in groups.values() for flag in flags if flag.positional]
    parser = _Parser(
        prog=prog,
        usage=" ".join([prog, *words, "[flags]"]),
        description=about,
        formatter_class=_Formatter,
        add_help=False,
        allow_abbrev=False,
    )
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            default = (defaults or {}).get(flag.dest)
            group.add_argument(
                *([flag.dest] if flag.positional else [flag.name]),
                **_settings(flag, flag.option.help + _format_default(default)),
            )
    return parser


def _settings(flag: Flag, text: str) -> dict[str, Any]:
    shared = {"metavar": flag.metavar, "help": text.replace("%", "%%"), "type": flag.read}
    if flag.positional:
        return {**shared, "nargs": None if flag.required else "?"}
    action: dict[str, Any] = {"action": "extend", "nargs": "+"} if flag.many else {"action": _Once}
    required = {"required": True} if flag.required else {}
    return {**shared, **action, **required, "dest": flag.dest, "default": argparse.SUPPRESS}


def _format_default(value: Any) -> str:
    if value is None or value is MISSING or value is False or value in ("", (), []):
        return ""
    return f" (default: {value if isinstance(value, str) else str(value).lower()})"


def format_help(
    groups: Groups, prog: str, about: str, defaults: Mapping[str, Any] | None = None
) -> str:
    """Return the help page; ``defaults`` are values by ``dest``."""
    page = _make_parser(groups, prog, about, defaults).format_help().rstrip()
    aliases = [
        f"{alias} for {flag.name}"
        for flags in groups.values()
        for flag in flags
        for alias in flag.option.aliases
    ]
    if aliases:
        page += "\n\n" + wrap(f"Also understood: {', '.join(aliases)}.")
    return page


def wrap(text: str, indent: str = "") -> str:
    """Return paragraphs no wider than the terminal."""
    width = max(shutil.get_terminal_size().columns - 2, 40)
    return "\n".join(
        textwrap.fill(
            line,
            width,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in text.splitlines()
    )


def asks_help(words: Sequence[str]) -> bool:
    """Whether the words ask for help, whatever else they say."""
    return "--help" in words or "-h" in words
