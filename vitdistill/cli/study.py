"""``vitdistill study``."""

import os
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ..recipes import find_file
from ..report.answers import ask
from ..study.plan import Row, Study, load_study
from ..study.run import Work, check, describe, run_study
from ..world import choose_device
from .arguments import StudyArguments
from .console import say, working
from .recipe import read_setting
from .render import teller
from .report import write_report


def run(args: StudyArguments) -> int:
    """Do a study, or go on with it, and write the report on it; or only say what it will cost."""
    study = _study(args)
    output = Path(args.output or Path("studies") / study.name)
    if args.dry_run:
        work = Work(study, output)
        working("counting what every row costs, and timing its steps")
        check(work)
        say("\n".join(describe(work, args.device)))
        return 0
    console = Console()
    quiet = Console(file=console.file, quiet=not console.is_terminal)
    run_study(study, output, teller(args), device=args.device, console=quiet)
    if os.environ.get("RANK", "0") == "0":
        work, device = Work(study, output), choose_device(args.device)
        for folder in (folder for job in work.jobs for folder in work.runs(job)):
            ask(folder, device, lambda text: None)
        write_report([output], output / "report.html")
    return 0


def _study(args: StudyArguments) -> Study:
    """Return the study of a file, or of one recipe, with the command line's changes."""
    file, name = find_file(args.study), args.study.replace(":", "_")
    if file is not None:
        study = load_study(file)
    else:
        study = Study(name=name, rows={name: Row(recipe=args.study)})
    values = {**study.set, **dict(map(read_setting, args.set))}
    if args.data_dir is not None:
        values["data.dir"] = args.data_dir
    return replace(study, set=values, seeds=args.seeds or study.seeds)
