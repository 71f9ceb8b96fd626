"""``vitdistill eval``: what a model answers, and what its features are worth."""

import json
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..data.loader import EvalLoader
from ..data.sources.base import ImageSource
from ..data.sources.open import open_source
from ..distill.teacher import Teacher
from ..errors import ConfigError
from ..evaluate.accuracy import evaluate
from ..evaluate.features import Pool, check_pool, extract
from ..evaluate.knn import TEMPERATURE, knn_accuracy
from ..evaluate.linear import linear_probe
from ..messages import format_count, plural
from ..recipes.config import TeacherConfig
from ..runs.networks import amp_dtype_of, build_teacher, build_teacher_model
from ..vit.flops import forward_flops
from ..vit.needs import Needs
from ..world import World, join_world
from .arguments import EvalArguments


def run(args: EvalArguments) -> int:
    """Evaluate one model exactly, on one process or torchrun's many."""
    _check_probes(args)
    with join_world(args.device) as here:
        result = _evaluate(args, here)
    if here.is_main:
        print(json.dumps(result)) if args.json else _print(args, result)
    return 0


def _probes(args: EvalArguments) -> bool:
    """Whether features are judged."""
    return args.knn is not None or args.linear_probe


def _pool(args: EvalArguments) -> Pool:
    """Which features of an image are judged."""
    return "class" if args.pool == "class" else "mean"


def _check_probes(args: EvalArguments) -> None:
    probe = "--knn" if args.knn is not None else "--linear-probe"
    if args.pool is not None and not _probes(args):
        raise ConfigError("--pool has no effect without --knn or --linear-probe")
    if args.split == "train" and _probes(args):
        raise ConfigError(
            f"{probe} learns from the training images and cannot be judged on them: leave"
            " --split out"
        )


def _evaluate(args: EvalArguments, here: World) -> dict[str, Any]:
    source = open_source(args.data_dir, args.split)
    if not source.classes:
        raise ConfigError(
            f"the images in {args.data_dir} have no labels (no class folders): there is nothing to"
            " evaluate against"
        )
    bank = open_source(args.data_dir, "train", classes=source.classes) if _probes(args) else None
    if bank is not None and args.knn is not None and args.knn > len(bank):
        there = (
            f"there {'is' if len(bank) == 1 else 'are'} only {plural(len(bank), 'training image')}"
        )
        raise ConfigError(f"--knn is {args.knn}, and {there}: give at most that")
    amp_dtype = amp_dtype_of(args.amp_dtype, here.device)
    model, no_answers = _build(args, source.classes, here.device)
    spec = model.spec
    teacher = None
    if args.teacher_model is not None:
        taught = TeacherConfig(
            model=args.teacher_model,
            checkpoint=args.teacher_path,
            pretrained=args.teacher_pretrained,
            reorder_classes=args.reorder_classes,
        )
        teacher, _ = build_teacher(taught, "teacher", source.classes, spec, here.device)
    elif args.teacher_path is not None or args.teacher_pretrained:
        raise ConfigError(
            "--teacher-path and --teacher-pretrained have no effect without --teacher-model"
        )

    def load(images: ImageSource) -> EvalLoader:
        return EvalLoader(
            images,
            spec,
            batch_size=args.batch_size,
            workers=args.workers,
            world=here,
        )

    loader = load(source)
    scores: dict[str, Any] = {"num_samples": float(len(source))}
    if no_answers:
        scores["no_top1"] = no_answers
    else:
        scores |= evaluate(_Matched(model), loader, here, amp_dtype, teacher=teacher) or {}
    if bank is not None:
        scores |= _probe(args, model, load(bank), loader, here, amp_dtype)
    return {
        **scores,
        "num_parameters": model.network.num_parameters,
        "flops": forward_flops(model.model, spec.image_size),
        "images_per_second": _speed(model, min(args.batch_size, 64), here.device, amp_dtype),
        "device": (
            torch.cuda.get_device_name(here.device)
            if here.device.type == "cuda"
            else str(here.device)
        ),
        "threads": torch.get_num_threads(),
    }


def _build(
    args: EvalArguments, classes: tuple[str, ...], device: torch.device
) -> tuple[Teacher, str]:
    """The model, and why it has no answers to be counted; empty if it has.

    Without a classifier for these classes its features can still be judged, where that is asked
    for.
    """
    config = TeacherConfig(
        model=args.model,
        checkpoint=args.model_path,
        pretrained=args.pretrained,
        image_size=args.img_size,
        reorder_classes=args.reorder_classes,
    )
    built = build_teacher_model(config, "model")
    if _probes(args):
        check_pool(_pool(args), built.network.has_class_token)
    if built.network.num_classes == 0:
        reason = f"{args.model} has no classifier"
        if not _probes(args):
            raise ConfigError(
                f"{reason}, so it has no accuracy: give --knn or --linear-probe to judge its"
                " features"
            )
        if args.teacher_model is not None:
            raise ConfigError(
                f"{reason}, and a teacher's answers cannot be compared with any: leave"
                " --teacher-model out"
            )
    else:
        try:
            return build_teacher(config, "model", classes, built.spec, device, built=built)[0], ""
        except ConfigError as error:
            if not _probes(args) or args.teacher_model is not None:
                raise
            reason = str(error)
    return build_teacher(config, "model", classes, built.spec, device, {}, built)[0], reason


def _probe(
    args: EvalArguments,
    model: Teacher,
    bank: EvalLoader,
    loader: EvalLoader,
    here: World,
    amp_dtype: torch.dtype | None,
) -> dict[str, Any]:
    """What its features are worth, and how that was judged."""
    train = extract(model.model, bank, here, amp_dtype, _pool(args))
    val = extract(model.model, loader, here, amp_dtype, _pool(args))
    assert train is not None and val is not None
    found: dict[str, Any] = {"pool": _pool(args), "num_train_samples": len(train[1])}
    if args.knn is not None:
        found |= {"knn_k": args.knn, **knn_accuracy(*train, *val, k=args.knn)}
    if args.linear_probe:
        found |= linear_probe(*train, *val)
    return found


class _Matched(torch.nn.Module):
    """A model that answers in the data set's classes, as `evaluate` runs it."""

    def __init__(self, matched: Teacher) -> None:
        super().__init__()
        self.matched = matched

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.matched(images, Needs(logits=True)).logits
        assert logits is not None
        return logits


@torch.no_grad()
def _speed(
    model: Teacher, batch_size: int, device: torch.device, amp_dtype: torch.dtype | None
) -> float:
    """Images a second of the forward pass alone, median of at least 3 passes and 2 seconds."""
    images = torch.randn(batch_size, 3, *model.spec.image_size, device=device)
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 4 or (time.perf_counter() - begun < 2 and len(times) < 50):
        start = time.perf_counter()
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            model(images, Needs(logits=True))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return batch_size / sorted(times[1:])[len(times[1:]) // 2]


def _print(args: EvalArguments, result: dict[str, Any]) -> None:
    grid = Table(
        title=f"{args.model} on {args.data_dir} ({args.split})",
        show_header=False,
        title_justify="left",
    )
    rows = [("images", f"{result['num_samples']:,.0f}")]
    if "top1" in result:
        rows += [
            ("top-1", f"{result['top1']:.2%}"),
            ("top-5", f"{result['top5']:.2%}"),
            ("negative log-likelihood", f"{result['nll']:.4f} nats"),
            ("calibration error (ECE, 15 bins)", f"{result['ece']:.2%}"),
        ]
    if "pool" in result:
        pooled = "class token" if result["pool"] == "class" else "mean of the patches"
        rows += [("features", f"{pooled}, {plural(result['num_train_samples'], 'training image')}")]
    if "knn_top1" in result:
        rows += [
            (f"k-NN top-1 (k {result['knn_k']}, T {TEMPERATURE})", f"{result['knn_top1']:.2%}")
        ]
    if "knn_top5" in result:
        rows += [("k-NN top-5", f"{result['knn_top5']:.2%}")]
    if "linear_top1" in result:
        rows += [
            (f"linear probe top-1 (L2 {result['linear_l2']:g})", f"{result['linear_top1']:.2%}")
        ]
    if "agreement" in result:
        rows += [
            ("top-1 agreement with teacher", f"{result['agreement']:.2%}"),
            ("KL(teacher || model)", f"{result['kl']:.4f} nats"),
        ]
    where = (
        f"{result['device']}, {plural(result['threads'], 'thread')}"
        if result["device"] == "cpu"
        else result["device"]
    )
    rows += [
        ("parameters", format_count(result["num_parameters"], "").strip()),
        ("forward pass", f"{format_count(result['flops'])} an image"),
        ("speed, without loading", f"{result['images_per_second']:,.0f} images/s ({where})"),
    ]
    for row in rows:
        grid.add_row(*row)
    Console().print(grid)
    if "no_top1" in result:
        Console().print(
            f"no accuracy of its own: {result['no_top1']}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
