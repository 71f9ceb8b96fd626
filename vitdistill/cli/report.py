"""``vitdistill report``."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..report.answers import ask
from ..report.files import find_runs
from ..report.page import make_report
from ..report.write import write_html, write_markdown
from ..storage.atomic import write_atomic
from ..world import choose_device
from .arguments import ReportArguments
from .console import say, working


def run(args: ReportArguments) -> int:
    if args.device is not None and not args.ask:
        raise UserError("--device cannot take effect: only --ask runs anything on a device")
    output = Path(args.output)
    if args.ask:
        device = choose_device(args.device or "auto")
        for folder in find_runs(args.paths):
            ask(folder, device, working)
    markdown = (args.format or output.suffix.lower().lstrip(".")) == "md"
    write_report(args.paths, output, markdown)
    return 0


def write_report(paths: Sequence[str | Path], output: Path, markdown: bool = False) -> None:
    """Write the report on runs, unless it is there already."""
    document = make_report(paths, working)
    text = (write_markdown if markdown else write_html)(document).encode()
    if not output.is_file() or output.read_bytes() != text:
        write_atomic(output, text)
    say(f"the report on {document.about}: {output}")
