"""``vitdistill eval``: what a model answers, and what its features are worth."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from ..data.loader import EvalLoader
from ..data.sources.base import ImageSource
from ..data.sources.open import open_source
from ..distill.teacher import Teacher
from ..errors import ConfigError
from ..evaluate.accuracy import evaluate
from ..evaluate.features import Pool, check_pool, extract
from ..evaluate.knn import TEMPERATURE, K, knn_accuracy
from ..evaluate.linear import linear_probe
from ..messages import format_count, plural
from ..recipes.config import TeacherConfig
from ..runs.networks import amp_dtype_of, build_teacher, build_teacher_model
from ..vit.flops import forward_flops
from ..vit.needs import Needs
from ..world import World, join_world
from .flags import COUNT, TEXT, about, one_of, parse_flags, wrap


@dataclass
class EvalFlags:
    """Flags of ``eval``."""

    model: Positional[
        Annotated[
            str,
            TEXT,
            about("a run or export folder, timm name, or hf-hub:ORG/NAME", metavar="MODEL"),
        ]
    ] = field(metadata={"positional": "MODEL"})
    data_dir: Annotated[
        str,
        TEXT,
        about(
            "images: a folder or tar with val/, parquet files, hfds/NAME, torchvision/NAME?root=DIR"
        ),
    ]
    model_path: Annotated[str | None, TEXT, about("its weights (.safetensors, .pth)")] = None
    pretrained: Annotated[bool, about("take timm's pretrained weights")] = False
    img_size: Annotated[
        int | None, COUNT, about("side of its square input, pixels; none: its own")
    ] = None
    reorder_classes: Annotated[
        bool, about("accept its classes, and the teacher's, in another order, matched by name")
    ] = False
    knn: Annotated[
        int | None,
        COUNT,
        about(
            f"judge its features by the K nearest training images (Wu et al. 2018); no K: {K}",
            metavar="[K]",
        ),
    ] = None
    linear_probe: Annotated[
        bool, about("judge its features by a linear classifier trained on them")
    ] = False
    pool: Annotated[
        str | None,
        one_of("mean", "class"),
        about("features of an image: mean of its patches or class token; none: mean"),
    ] = None
    teacher_model: Annotated[str | None, TEXT, about("a teacher to compare its answers with")] = (
        None
    )
    teacher_path: Annotated[str | None, TEXT, about("the teacher's weights")] = None
    teacher_pretrained: Annotated[bool, about("take timm's pretrained weights for the teacher")] = (
        False
    )
    split: Annotated[Literal["val", "train"], one_of("val", "train"), about("which images")] = "val"
    batch_size: Annotated[int, COUNT, about("images a step and process")] = field(
        default=256, metadata={"aliases": ("-b",)}
    )
    workers: Annotated[int, COUNT, about("loader processes")] = field(
        default=2, metadata={"aliases": ("-j",)}
    )
    amp_dtype: Annotated[
        str,
        one_of("auto", "float32", "bfloat16", "float16"),
        about("precision; auto: bfloat16 on a GPU, float32 on a CPU"),
    ] = "auto"
    device: Annotated[str, TEXT, about("auto, cpu, cuda or cuda:N")] = "auto"
    json: Annotated[bool, about("print one line of JSON instead of a table")] = False

    @property
    def probes(self) -> bool:
        """Whether features are judged."""
        return self.knn is not None or self.linear_probe

    @property
    def pooled(self) -> Pool:
        """Which features, with the default."""
        return "class" if self.pool == "class" else "mean"


def main(words: Sequence[str]) -> int:
    """Evaluate one model exactly, on one process or torchrun's many."""
    description = (
        "Top-1 and top-5 accuracy, calibration error, agreement with a teacher, parameters, FLOPs"
        " and speed of a model; k-NN and a linear probe of its features, also where it has no"
        " classifier."
    )
    flags = parse_flags(EvalFlags, _with_k(words), "vitdistill eval", wrap(description))
    if flags.batch_size < 1:
        raise ConfigError(f"--batch-size is {flags.batch_size}: give at least 1")
    _check_probes(flags)
    with join_world(flags.device) as here:
        result = _evaluate(flags, here)
    if here.is_main:
        print(json.dumps(result)) if flags.json else _print(flags, result)
    return 0


def _with_k(words: Sequence[str]) -> list[str]:
    """The words with the default number of neighbours after a ``--knn`` that names none."""
    spelled: list[str] = []
    for word, following in zip(words, (*words[1:], ""), strict=False):
        spelled += (
            [word, str(K)] if word == "--knn" and not following.lstrip("+-").isdigit() else [word]
        )
    return spelled


def _check_probes(flags: EvalFlags) -> None:
    probe = "--knn" if flags.knn is not None else "--linear-probe"
    if flags.pool is not None and not flags.probes:
        raise ConfigError("--pool has no effect without --knn or --linear-probe")
    if flags.knn is not None and flags.knn < 1:
        raise ConfigError(f"--knn is {flags.knn}: give at least 1 neighbour")
    if flags.split == "train" and flags.probes:
        raise ConfigError(
            f"{probe} learns from the training images and cannot be judged on them: leave"
            " --split out"
        )


def _evaluate(flags: EvalFlags, here: World) -> dict[str, Any]:
    source = open_source(flags.data_dir, flags.split)
    if not source.classes:
        raise ConfigError(
            f"the images in {flags.data_dir} have no labels (no class folders): there is nothing to"
            " evaluate against"
        )
    bank = open_source(flags.data_dir, "train", classes=source.classes) if flags.probes else None
    if bank is not None and flags.knn is not None and flags.knn > len(bank):
        there = (
            f"there {'is' if len(bank) == 1 else 'are'} only {plural(len(bank), 'training image')}"
        )
        raise ConfigError(f"--knn is {flags.knn}, and {there}: give at most that")
    amp_dtype = amp_dtype_of(flags.amp_dtype, here.device)
    model, no_answers = _build(flags, source.classes, here.device)
    spec = model.spec
    teacher = None
    if flags.teacher_model is not None:
        taught = TeacherConfig(
            model=flags.teacher_model,
            checkpoint=flags.teacher_path,
            pretrained=flags.teacher_pretrained,
            reorder_classes=flags.reorder_classes,
        )
        teacher, _ = build_teacher(taught, "teacher", source.classes, spec, here.device)
    elif flags.teacher_path is not None or flags.teacher_pretrained:
        raise ConfigError(
            "--teacher-path and --teacher-pretrained have no effect without --teacher-model"
        )

    def load(images: ImageSource) -> EvalLoader:
        return EvalLoader(
            images,
            spec,
            batch_size=flags.batch_size,
            workers=flags.workers,
            world=here,
        )

    loader = load(source)
    scores: dict[str, Any] = {"num_samples": float(len(source))}
    if no_answers:
        scores["no_top1"] = no_answers
    else:
        scores |= evaluate(_Matched(model), loader, here, amp_dtype, teacher=teacher) or {}
    if bank is not None:
        scores |= _probe(flags, model, load(bank), loader, here, amp_dtype)
    return {
        **scores,
        "num_parameters": model.network.num_parameters,
        "flops": forward_flops(model.model, spec.image_size),
        "images_per_second": _speed(model, min(flags.batch_size, 64), here.device, amp_dtype),
        "device": (
            torch.cuda.get_device_name(here.device)
            if here.device.type == "cuda"
            else str(here.device)
        ),
        "threads": torch.get_num_threads(),
    }


def _build(flags: EvalFlags, classes: tuple[str, ...], device: torch.device) -> tuple[Teacher, str]:
    """The model, and why it has no answers to be counted; empty if it has.

    Without a classifier for these classes its features can still be judged, where that is asked
    for.
    """
    config = TeacherConfig(
        model=flags.model,
        checkpoint=flags.model_path,
        pretrained=flags.pretrained,
        image_size=flags.img_size,
        reorder_classes=flags.reorder_classes,
    )
    built = build_teacher_model(config, "model")
    if flags.probes:
        check_pool(flags.pooled, built.network.has_class_token)
    if built.network.num_classes == 0:
        reason = f"{flags.model} has no classifier"
        if not flags.probes:
            raise ConfigError(
                f"{reason}, so it has no accuracy: give --knn or --linear-probe to judge its"
                " features"
            )
        if flags.teacher_model is not None:
            raise ConfigError(
                f"{reason}, and a teacher's answers cannot be compared with any: leave"
                " --teacher-model out"
            )
    else:
        try:
            return build_teacher(config, "model", classes, built.spec, device, built=built)[0], ""
        except ConfigError as error:
            if not flags.probes or flags.teacher_model is not None:
                raise
            reason = str(error)
    return build_teacher(config, "model", classes, built.spec, device, {}, built)[0], reason


def _probe(
    flags: EvalFlags,
    model: Teacher,
    bank: EvalLoader,
    loader: EvalLoader,
    here: World,
    amp_dtype: torch.dtype | None,
) -> dict[str, Any]:
    """What its features are worth, and how that was judged."""
    train = extract(model.model, bank, here, amp_dtype, flags.pooled)
    val = extract(model.model, loader, here, amp_dtype, flags.pooled)
    assert train is not None and val is not None
    found: dict[str, Any] = {"pool": flags.pooled, "num_train_samples": len(train[1])}
    if flags.knn is not None:
        found |= {"knn_k": flags.knn, **knn_accuracy(*train, *val, k=flags.knn)}
    if flags.linear_probe:
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


def _print(flags: EvalFlags, result: dict[str, Any]) -> None:
    grid = Table(
        title=f"{flags.model} on {flags.data_dir} ({flags.split})",
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
