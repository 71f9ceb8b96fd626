"""``vitdistill eval``: what a model answers, and what its features are worth."""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from rich.console import Console

from ..errors import ConfigError, UserError
from ..evaluate.knn import TEMPERATURE
from ..messages import format_count, format_table, plural
from ..recipes.config import TeacherConfig
from ..recipes.convert import replace_fields
from ..runs.display import Display
from ..runs.evaluate import Evaluation, evaluate_model, images_of
from ..runs.identity import resolve_run
from ..world import join_world
from .arguments import EvalArguments
from .console import say
from .recipe import put, read_setting


def run(args: EvalArguments) -> int:
    """Evaluate models exactly, on one process or torchrun's many."""
    if args.data_dir is None:
        folder, part = images_of(args.models)
        args = replace(args, data_dir=folder, val_split=args.val_split or part)
    jobs = [_job(args, model) for model in args.models]
    with join_world(args.device) as world:
        shown = Display(Console(), world.is_main and not args.json)
        with shown as display:
            results = [evaluate_model(job, world, display) for job in jobs]
    if world.is_main and args.json:
        print("\n".join(map(json.dumps, results)))
    elif world.is_main:
        _print(results, f"{args.data_dir} ({args.split})")
    return 0


def _job(args: EvalArguments, name: str) -> Evaluation:
    probe = "--knn" if args.knn is not None else "--linear-probe" if args.linear_probe else ""
    if args.pool is not None and not probe:
        raise ConfigError("--pool has no effect without --knn or --linear-probe", field="pool")
    if args.split == "train" and probe:
        what = f"{probe} learns from the training images and cannot be judged on them"
        raise ConfigError(what, "leave --split out", field="split")
    of_teacher = any(item.startswith("teacher.") for item in args.set)
    if args.teacher_model is None and (args.teacher_path or args.teacher_pretrained or of_teacher):
        what = "settings of the teacher have no effect without --teacher-model"
        raise ConfigError(what, field="teacher_model")
    if args.model_path and len(args.models) > 1:
        raise ConfigError("--model-path is for one model, but several are given", field="models")
    model = TeacherConfig(
        model=resolve_run(name),
        checkpoint=args.model_path,
        pretrained=args.pretrained,
        image_size=args.img_size,
        reorder_classes=args.reorder_classes,
    )
    teacher = TeacherConfig(
        model=args.teacher_model or "",
        checkpoint=args.teacher_path,
        pretrained=args.teacher_pretrained,
        reorder_classes=args.reorder_classes,
    )
    given = {f.name: getattr(args, f.name) for f in fields(Evaluation) if f.name in vars(args)}
    values: dict[str, Any] = {}
    for path, value in map(read_setting, args.set):
        if path.partition(".")[0] not in ("model", "teacher"):
            raise UserError(f"--set {path} names no network", "write model.FIELD or teacher.FIELD")
        put(values, path, value)
    given |= {"model": model, "teacher": teacher, "pool": args.pool or "mean"}
    job = replace_fields(Evaluation(**given), values)
    return job if args.teacher_model else replace(job, teacher=None)


def _print(results: Sequence[dict[str, Any]], images: str) -> None:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10**4
    say("\n".join([f"{images}:", *tabulate(results, width)]))
    for note in results[0].get("notes", ()):
        say(note, fold=True)
    for result in results:
        if "no_top1" in result:
            say(f"{result['model']}: no accuracy of its own: {result['no_top1']}", fold=True)


def tabulate(results: Sequence[dict[str, Any]], width: int) -> list[str]:
    """Return scores side by side; names that make them wider than ``width`` stand above them."""
    models, tables = [r["model"] for r in results], [dict(_rows(result)) for result in results]
    names = dict.fromkeys(name for table in tables for name in table)
    rows = [(name, *(table.get(name, "") for table in tables)) for name in names]
    lines = format_table([("", *models), *rows])
    if max(map(len, lines)) <= width:
        return lines
    numbers = [f"({i})" for i in range(1, len(models) + 1)]
    named = [f"  {number} {model}" for number, model in zip(numbers, models, strict=True)]
    return [*named, "", *format_table([("", *numbers), *rows])]


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what is shown of the scores that there are."""
    found = {**result, "num_samples": f"{result['num_samples']:,.0f}"}
    if "pool" in result:
        pool = {"class": "class token", "mean": "patch mean"}[result["pool"]]
        found["features"] = pool
        found["of_bank"] = f"features of {plural(result['num_train_samples'], 'image')}"
    lines = [
        ("num_samples", "images", "{num_samples}"),
        ("top1", "top-1", "{top1:.2%}"),
        ("top1_among", "top-1 among {among}", "{top1_among:.2%}"),
        ("top5", "top-5", "{top5:.2%}"),
        ("nll", "negative log-likelihood", "{nll:.4f} nats"),
        ("ece", "calibration error (ECE)", "{ece:.2%}"),
        ("features", "{of_bank}", "{features}"),
        ("knn_top1", f"k-NN top-1 (k {{knn_k}}, T {TEMPERATURE})", "{knn_top1:.2%}"),
        ("knn_top5", "k-NN top-5", "{knn_top5:.2%}"),
        ("linear_top1", "linear probe top-1", "{linear_top1:.2%} (L2 {linear_l2:g})"),
        ("agreement", "agrees with the teacher", "{agreement:.2%}"),
        ("kl", "KL(teacher || model)", "{kl:.4f} nats"),
    ]
    shown = [(name, text) for key, name, text in lines if key in found]
    rows = [(name.format_map(found), text.format_map(found)) for name, text in shown]
    threads = f", {plural(result['threads'], 'thread')}" if result["device"] == "cpu" else ""
    count = result["num_parameters"]
    return [
        *rows,
        ("parameters", format_count(count, "").strip() if count else "not counted"),
        ("an image", format_count(result["flops"]) if result["flops"] else "not counted"),
        (f"images/s ({result['device']}{threads})", f"{result['images_per_second']:,.0f}"),
    ]
