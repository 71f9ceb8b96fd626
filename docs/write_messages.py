"""Write the page of messages from tests/messages.txt, which the tests hold to what is printed."""

import re
from collections.abc import Iterator
from pathlib import Path

MESSAGES = Path(__file__).parents[1] / "tests" / "messages.txt"

KINDS = {
    64: ("the words of the command", "`vitdistill COMMAND --help` lists what the command takes"),
    65: (
        "images, weights, labels or another file",
        "look at the file it names: a copy or a download may be incomplete",
    ),
    78: (
        "a setting, or settings that do not go together",
        "`vitdistill explain RECIPE --recipe-yaml` prints every setting of a recipe,"
        " `vitdistill recipes` lists the recipes",
    ),
    70: (
        "a loss that became NaN, or another process of the run that failed first",
        "lower the learning rate, or read that process's message",
    ),
    71: ("memory that ran out", "`-b` with fewer images a step, or `--accumulate 2`"),
    74: ("a disk that is full or fails", "make room and run the same command again: it goes on"),
    75: ("a run that was asked to stop and has saved", "run the same command again: it goes on"),
    77: ("a path that may not be read or written", "change its permissions, or name another"),
}
"""What a message of an exit code is about, and its cure where it names none itself."""

REMEDY = re.compile(
    r"(a (whole )?number|add|check|choose|did you mean|download|expected one|fill|for a network|give"
    r"|go on|leave|make|name|replace|set|take|true or false|use|'vitdistill|write|if you trust)\b"
    r"|'vitdistill"
)
"""How a remedy begins: with what to do."""

INTRO = """# Messages and their cures

<!-- Written by `make docs` (docs/write_messages.py) from tests/messages.txt. -->

A mistake is answered by one line on standard error, `vitdistill COMMAND: what is wrong: what to do`. Nothing that you
have is changed or deleted, so correct the command and give it again. Search this page for a few words of your message; the
names and numbers in it are those of examples. A Python traceback is never your mistake: please report it with the command.

A line that begins with `warning:` stops nothing. It says what looks wrong but may be meant, and names the setting that changes it.

| exit code | is about | cure, where the message names none |
|---:|---|---|
"""


def messages() -> Iterator[tuple[str, str, int, str]]:
    """Yield the group, the command, the exit code and the text of every message."""
    group = command = ""
    for line in MESSAGES.read_text("utf-8").splitlines():
        if line.startswith("== "):
            group = line.strip("= ")
        elif line.startswith("$ "):
            command = line[2:]
        elif answer := re.match(r"(\d+)  vitdistill[^:]*: (.*)", line):
            yield group, command, int(answer[1]), answer[2]


def split_remedy(text: str) -> tuple[str, str]:
    """Split a message into what is wrong and what to do, which may be empty."""
    for colon in re.finditer(": ", text):
        if REMEDY.match(text, colon.end()):
            return text[: colon.start()], text[colon.end() :]
    return text, ""


def escape(text: str) -> str:
    """Write text so that Markdown keeps its characters; a Python command stands as code."""
    words, python, code = text.partition("python -c ")
    plain = re.sub(r"([\\\\`*_<>\[\]#|])", r"\\\1", words)
    return plain + (f"`{python}{code}`" if python else "")


def write_messages() -> str:
    """Write the page: every message with its cure, in groups."""
    lines = [
        INTRO + "".join(f"| {code} | {about} | {cure} |\n" for code, (about, cure) in KINDS.items())
    ]
    last = ""
    for group, command, code, text in messages():
        if group != last:
            lines.append(f"## {group}\n")
            last = group
        wrong, remedy = split_remedy(text)
        said = command.replace(" {short}", "")
        idle = "leave it out, or give the recipe what it acts on" if "effect" in wrong else ""
        cure = escape(remedy) or idle or KINDS[code][1]
        lines.append(f"{escape(wrong)}\n:   {cure}<br>`{said}`\n")
    return "\n".join(lines)
