"""One parser for every command: argparse, made from options.

A mistake is answered in one sentence with what to write instead, and before torch is imported.
"""

import argparse
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from ..errors import ConfigError, UserError
from ..messages import suggest
from ..option import Option, check_option, convert_scalar, options_of
from ..recipes.settings import PARTS

_AMP = ("--amp", "--bf16", "--fp16", "--mixed-precision", "--native-amp")
ELSEWHERE: dict[str, str] = {
    **dict.fromkeys(_AMP, "write --amp-dtype bfloat16, which is the default on a GPU"),
    "--blr": "write --lr, which is not scaled: blr x batch size / 256",
    "--alpha": "write --kd-weight alpha --ce-weight 1-alpha",
    "--bs": "write --batch-size, that of all processes together",
    "--config": "write the YAML file in place of the recipe's name, without a flag",
    "--data-set": "write --data-dir, a folder or torchvision/CIFAR10?root=DIR",
    "--dataset": "write --data-dir",
    "--dataset-name": "write --data-dir",
    "--distillation-alpha": "write --kd-weight alpha --ce-weight 1-alpha",
    "--distillation-type": "the recipe says it, kd for soft, hard_kd for hard and alone for none",
    "--eval": "write vitdistill eval RUN --data-dir FOLDER",
    "--gpu": "write --device cuda:0",
    "--learning-rate": "write --lr",
    "--log-dir": "curves are written into the run's folder, --output",
    "--log-wandb": "write --log-to wandb",
    "--mask-ratio": "write --set masking.mask_rate=0.75",
    "--model-ema": "write --model-ema-decay 0.9998",
    "--nb-classes": "the classes are those of the images",
    "--num-classes": "the classes are those of the images",
    "--opt-betas": "write --set optim.opt_args.betas=[0.9,0.95]",
    "--optimizer": "write --opt",
    "--per-device-train-batch-size": "write --batch-size, that of all processes together",
    "--resume": "the same command goes on with the run in its --output",
    "--student": "write --model",
    "--tau": "write --temperature",
    "--train-dir": "write --data-dir",
    "--wd": "write --weight-decay",
}
"""Flags of other tools that are not flags here, and what to write instead."""


@dataclass(frozen=True)
class Flag:
    """A flag or positional argument of the command line.

    It fills the field ``dest`` of the arguments, or of the recipe, with a ``kind``. The ``default``
    is for the help; MISSING: required.
    """

    dest: str
    kind: Any
    option: Option
    default: Any = None

    @property
    def name(self) -> str:
        return self.option.spellings[0]

    @property
    def positional(self) -> bool:
        return not self.name.startswith("-")

    @property
    def value_kind(self) -> Any:
        """The type of one value."""
        args = [arg for arg in get_args(self.kind) if arg not in (type(None), ...)]
        return args[0] if get_origin(self.kind) in (Union, UnionType, tuple) else self.kind

    @property
    def alone(self) -> str:
        """What it means without a value; empty: it needs one."""
        return self.option.alone or ("true" if self.value_kind is bool else "")

    @property
    def metavar(self) -> str:
        """What stands for its value in the help."""
        words = [word for word in self.option.flag.split() if not word.startswith("-")]
        kind = self.value_kind
        if words:
            return " ".join(words)
        if get_origin(kind) is Literal:
            return "|".join(get_args(kind))
        return {int: "N", float: "NUMBER", bool: ""}.get(kind, "TEXT")

    def read(self, word: str) -> Any:
        """Return the value that ``word`` spells; raises `UserError` naming the flag."""
        kind, choices = self.value_kind, get_args(self.value_kind)
        optional = type(None) in get_args(self.kind)
        if optional and word.lower() in ("none", "null") and "none" not in choices:
            return None
        if get_origin(kind) is Literal:
            if word not in choices:
                raise UserError(f"{self.name} is {word!r}", suggest(word, choices))
            return word
        try:
            return convert_scalar(word, kind, self.name)
        except ConfigError as error:
            raise UserError(error.what, error.fixes) from None


def flags_of(arguments: type) -> Iterator[Flag]:
    """Yield the flags that fill a dataclass of options."""
    hints, described = get_type_hints(arguments), options_of(arguments)
    for item in fields(arguments):
        if item.name in described:
            yield Flag(item.name, hints[item.name], described[item.name], item.default)


Groups = Mapping[str, Sequence[Flag]]
"""Flags by the heading they stand under in the help."""


def parse_words(groups: Groups, words: Sequence[str], prog: str) -> dict[str, Any]:
    """Return the values that the words give, by the flags' ``dest``; raises `UserError`."""
    every = [flag for flags in groups.values() for flag in flags]
    known = {spelling: flag for flag in every for spelling in flag.option.spellings}
    parser = _make_parser(groups, prog)
    found = vars(parser.parse_intermixed_args(_spell_out(words, known, prog)))
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}
    for flag in every:
        if flag.dest in values:
            check_option(values[flag.dest], flag.kind, flag.option, flag.option.field or flag.dest)
    return values


def _is_flag(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return word.startswith("-") and word != "-"
    return False


def _spell_out(words: Sequence[str], known: Mapping[str, Flag], prog: str) -> list[str]:
    """Return the words with each flag by its first name, and a value for each that stands alone.

    With argparse's ``nargs="?"``, ``--pretrained kd`` would take the recipe for its value.
    """
    spelled = []
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if not _is_flag(word):
            spelled.append(word)
            continue
        name, equals, value = word.partition("=")
        plain = name.replace("_", "-")
        flag = known.get(plain)
        switch = known.get(plain.replace("--no-", "--", 1))
        if flag is None and not equals and switch is not None and switch.value_kind is bool:
            flag, equals, value = switch, "=", "false"
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
    except UserError:
        return False
    return True


def _unknown(name: str, known: Mapping[str, Flag], prog: str) -> UserError:
    plain, field = name.replace("_", "-"), name[2:].replace("-", "_")
    found = [
        (place, options[field])
        for place, part in PARTS.items()
        if field in (options := options_of(part))
    ]
    ways = [next(iter(about.spellings), "") for _, about in found]
    ways = [way for way in ways if way in known]
    ways += [f"--set {place}.{field}=VALUE" for place, _ in found]
    ways = [f"--set {name[2:]}=VALUE"] if "." in name else ways  # --optim.lr
    advice = ELSEWHERE.get(plain) or (f"write {ways[0]}" if ways else "")
    alone = [
        flag.name
        for flag in known.values()
        if flag.positional and field in (flag.dest, flag.dest.rstrip("s"))
    ]
    if alone:
        advice = f"write {alone[0]} without a flag"
    # --set of a command without a recipe sets fields of its networks.
    own = {flag for flag in known if flag != "--set" or not known[flag].option.field}
    if not own.issuperset(re.findall(r"--[\w-]+", advice)):
        advice = ""
    # Dashes would make all flags alike.
    names = [spelling[2:] for spelling in known if spelling.startswith("--")]
    longer = [name for name in names if len(plain) > 4 and name.startswith(plain[2:])]
    close = longer[:1] or get_close_matches(plain[2:], names, n=1)
    hint = f"did you mean '--{close[0]}'?" if close else f"'{prog} --help' lists them"
    return UserError(f"there is no flag {name}", advice or hint)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        what, fix = message.removeprefix("argument "), f"'{self.prog} --help' says more"
        if what.startswith("unrecognized") and "=" in what:
            fix = "write --set FIELD=VALUE"
        raise UserError(what, fix)


class _Once(argparse.Action):
    """Store a value, and refuse a second."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        if hasattr(namespace, self.dest):
            raise UserError(f"{self.option_strings[0]} is given twice", "give it once")
        setattr(namespace, self.dest, values)


def _make_parser(groups: Groups, prog: str, about: str = "") -> argparse.ArgumentParser:
    every = [flag for flags in groups.values() for flag in flags]
    named = [flag for flag in every if not flag.positional]
    aliases = [f"{other} for {flag.name}" for flag in named for other in flag.option.spellings[1:]]
    notes = [f"Also understood: {', '.join(aliases)}."] if aliases else []
    if any(flag.value_kind is bool for flag in every):
        notes.insert(0, "A flag without a value is a switch: --no-FLAG turns it off.")
    parser = _Parser(
        prog=prog,
        usage=" ".join([prog, *(flag.metavar for flag in every if flag.positional), "[flags]"]),
        description=about,
        epilog="\n\n".join(wrap(line) for line in notes) or None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            group.add_argument(flag.dest if flag.positional else flag.name, **_settings(flag))
    return parser


def _settings(flag: Flag) -> dict[str, Any]:
    value, required = flag.default, flag.default is MISSING
    shown = value is not False and value not in (None, MISSING, "", ())
    text = flag.option.help + (f" (default: {value})" if shown else "")
    shared = {
        "metavar": flag.metavar,
        "type": flag.read,
        "default": argparse.SUPPRESS,
        "help": text,
    }
    many = get_origin(flag.kind) is tuple
    if flag.positional:
        return {**shared, "nargs": "+" if many else None if required else "?"}
    action: dict[str, Any] = {"action": "extend", "nargs": "+"} if many else {"action": _Once}
    return {**shared, **action, "dest": flag.dest, "required": required}


def format_help(groups: Groups, prog: str, about: str) -> str:
    return _make_parser(groups, prog, about).format_help().rstrip()


def wrap(text: str, indent: str = "") -> str:
    """Return paragraphs no wider than the terminal."""
    width = max(shutil.get_terminal_size().columns - 2, 40)
    return "\n".join(
        textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False)
        for line in text.splitlines()
    )
