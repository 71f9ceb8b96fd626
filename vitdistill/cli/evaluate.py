"""``vitdistill eval``: what a model answers, and what its features are worth."""

import json
from typing import Any

from ..errors import ConfigError
from ..evaluate.knn import TEMPERATURE
from ..messages import format_count, format_table, plural
from ..recipes.config import TeacherConfig
from ..runs.evaluate import Evaluation, evaluate_model
from ..world import join_world
from .arguments import EvalArguments
from .say import say


def run(args: EvalArguments) -> int:
    """Evaluate one model exactly, on one process or torchrun's many."""
    job = _job(args)
    with join_world(args.device) as world:
        result = evaluate_model(job, world)
    if world.is_main:
        print(json.dumps(result)) if args.json else _print(args, result)
    return 0


def _job(args: EvalArguments) -> Evaluation:
    probe = "--knn" if args.knn is not None else "--linear-probe" if args.linear_probe else ""
    if args.pool is not None and not probe:
        raise ConfigError("--pool has no effect without --knn or --linear-probe", field="pool")
    if args.split == "train" and probe:
        what = f"{probe} learns from the training images and cannot be judged on them"
        raise ConfigError(what, "leave --split out", field="split")
    if args.teacher_model is None and (args.teacher_path or args.teacher_pretrained):
        what = "--teacher-path and --teacher-pretrained have no effect without --teacher-model"
        raise ConfigError(what, field="teacher_model")
    model = TeacherConfig(
        model=args.model,
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
    same = ("data_dir", "split", "val_split", "knn", "linear_probe", "batch_size", "workers")
    return Evaluation(
        model=model,
        teacher=teacher if teacher.model else None,
        pool=args.pool or "mean",
        amp_dtype=args.amp_dtype,
        skip_damaged=args.skip_damaged,
        **{name: getattr(args, name) for name in same},
    )


def _print(args: EvalArguments, result: dict[str, Any]) -> None:
    title = f"{args.model} on {args.data_dir} ({args.split})"
    say("\n".join(format_table([(title, ""), *_rows(result)])))
    for note in result.get("notes", ()):
        say(note)
    if "no_top1" in result:
        say(f"no accuracy of its own: {result['no_top1']}")


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what is shown of the scores that there are."""
    pool = {"class": "class token", "mean": "mean of the patches"}.get(result.get("pool", ""))
    found = {**result, "num_samples": f"{result['num_samples']:,.0f}"}
    lines = [
        ("num_samples", "images", "{num_samples}"),
        ("top1", "top-1", "{top1:.2%}"),
        ("top5", "top-5", "{top5:.2%}"),
        ("nll", "negative log-likelihood", "{nll:.4f} nats"),
        ("ece", "calibration error (ECE, 15 bins)", "{ece:.2%}"),
        ("knn_top1", f"k-NN top-1 (k {{knn_k}}, T {TEMPERATURE})", "{knn_top1:.2%}"),
        ("knn_top5", "k-NN top-5", "{knn_top5:.2%}"),
        ("linear_top1", "linear probe top-1 (L2 {linear_l2:g})", "{linear_top1:.2%}"),
        ("agreement", "top-1 agreement with teacher", "{agreement:.2%}"),
        ("kl", "KL(teacher || model)", "{kl:.4f} nats"),
    ]
    shown = [(name, text) for key, name, text in lines if key in found]
    rows = [(name.format_map(found), text.format_map(found)) for name, text in shown]
    if pool is not None:
        features = f"{pool}, {plural(result['num_train_samples'], 'training image')}"
        rows.insert(5 if "top1" in found else 1, ("features", features))
    threads = f", {plural(result['threads'], 'thread')}" if result["device"] == "cpu" else ""
    speed = f"{result['images_per_second']:,.0f} images/s ({result['device']}{threads})"
    return [
        *rows,
        ("parameters", format_count(result["num_parameters"], "").strip()),
        ("forward pass", f"{format_count(result['flops'])} an image"),
        ("speed, without loading", speed),
    ]
