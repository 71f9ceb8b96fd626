"""Folders of runs as they would be left behind, written without training."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitdistill.data.augment import InputSpec
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import SoftKD
from vitdistill.methods.maskedkd import MaskedKD
from vitdistill.recipes.config import DataConfig, Recipe, StudentConfig, TeacherConfig, TrainConfig
from vitdistill.recipes.settings import OptimConfig
from vitdistill.recipes.stages import Stages
from vitdistill.recipes.yaml import dump_recipe
from vitdistill.storage.atomic import sha256_file
from vitdistill.weights.create import create_model
from vitdistill.weights.export import export_timm

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 1}
SPEC = InputSpec((16, 16), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NUM_IMAGES = 40


def alone(name: str, seed: int = 0, **changes: Any) -> Recipe:
    """A student without a teacher."""
    recipe = Recipe(
        name=name,
        student=StudentConfig(model="vit_tiny_patch16_224", model_args=VIT),
        data=DataConfig(dir="photos"),
        train=TrainConfig(epochs=10, batch_size=4, seed=seed),
    )
    return replace(recipe, **changes)


def taught(name: str, seed: int = 0, teacher: str = "teacher", **changes: Any) -> Recipe:
    """The same student with a teacher."""
    objectives = {"ce": CrossEntropy(weight=0.5), "kd": SoftKD(weight=0.5)}
    return alone(
        name,
        seed,
        teachers={"teacher": TeacherConfig(model=teacher)},
        objectives=objectives,
        **changes,
    )


def make_run(
    folder: Path,
    recipe: Recipe,
    top1: float | None = None,
    *,
    learnt_from: Path | None = None,
    began_from: Path | None = None,
    right: int | None = None,
    classes: tuple[str, ...] = ("a", "b"),
    environment: dict[str, Any] | None = None,
) -> Path:
    """Write a run's folder; ``top1`` None: one that has only begun. ``right``: how many of its
    answers are right, if they were kept one by one; ``learnt_from``: the run of its teacher;
    ``began_from``: that of its first weights.
    """
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    identity = {"validation images": "the images"}
    for field, run in (("teachers.teacher", learnt_from), ("student", began_from)):
        if run is not None:
            identity[f"{field}.model"] = sha256_file(run / "last" / "model.safetensors")
    (folder / "identity.json").write_text(json.dumps(identity))
    if top1 is None:
        return folder
    student = recipe.student if began_from is None else alone("first").student
    model = create_model(student.model, num_classes=2, **student.model_args)
    export_timm(
        model,
        folder / "last",
        architecture=student.model,
        model_args=student.model_args,
        classes=("a", "b"),
        input_spec=SPEC,
        prove=False,
    )
    scores = {"num_samples": NUM_IMAGES, "top1": top1, "nll": 0.5, "ece": 0.1}
    summary = {"steps": 30, "scores": scores, "best_top1": top1, "best_epoch": 1.0, "seconds": 75.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = [{"kind": "eval", "step": 3 * e, "epoch": e, "top1": top1 * e / 10} for e in (1, 5, 10)]
    lines += [{"kind": "train", "step": 3 * e, "epoch": e, "loss": 2 / e} for e in (1, 5, 10)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "timing.jsonl").write_text('{"step": 3, "images_per_second": 120.0}\n{"step": 6, "im')
    (folder / "environment.json").write_text(json.dumps({"0": environment or {"torch": "2.15"}}))
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "pictures.png")
    if right is not None:
        student = [0] * right + [1] * (NUM_IMAGES - right)
        answers = {
            "weights": sha256_file(folder / "last" / "model.safetensors"),
            "images": "the images",
            "classes": classes,
            "labels": [0] * NUM_IMAGES,
            "student": student,
            "teachers": {"teacher": [0] * NUM_IMAGES} if recipe.teachers else {},
            "scores": {"agreement.teacher": right / NUM_IMAGES} if recipe.teachers else {},
        }
        (folder / "answers.json").write_text(json.dumps(answers))
    return folder


def make_stages(
    folder: Path, prefix: str = "", seed: int = 0, teacher: Path | None = None, lr: float = 1e-4
) -> None:
    """Write a folder of stages, of which the first has the teacher and the learning rate;
    ``prefix``: of their names.
    """
    how = alone if teacher is None else taught
    first = how(f"{prefix}pretrain", seed, optim=OptimConfig(lr=lr))
    student = StudentConfig(model="stage:pretrain", model_args={"global_pool": "avg"})
    second = alone(f"{prefix}finetune", seed, student=student)
    stages = {"pretrain": first, "finetune": second}
    folder.mkdir(parents=True)
    whole = Stages(name=folder.name, description="one after the other", stages=stages)
    (folder / "stages.yaml").write_text(dump_recipe(whole))
    begun = make_run(folder / first.name, first, 0.3, learnt_from=teacher)
    second = replace(second, student=replace(student, model=str(begun)))
    make_run(folder / second.name, second, 0.8, began_from=begun)


HOSTILE = (
    "<script>alert(1)</script>",
    "</style><script>alert(2)</script>",
    '"><img src=x onerror=alert(3)>',
    "' onmouseover='alert(4)",
    "<svg onload=alert(5)>",
    "</title><h1>own</h1>",
    "<!-- ",
    "--> <b>",
    "&lt;b&gt; &amp; &#60;",
    "javascript:alert(6)",
    "[a](javascript:alert(7))",
    "![a](https://example.org/a.png)",
    "| a | b |",
    "`code` **bold** _it_ ~~no~~ #1 @someone",
    "https://example.org www.example.org",
    "{{ 7 * 7 }} ${7 * 7} %s {0}",
    "<base href=https://example.org>",
    "<meta http-equiv=refresh content=0>",
    "]]> <![CDATA[",
    "\u5b57 \u0645\u0631\u062d\u0628\u0627 \U0001f600 \\",
    "x" * 300,
)
LARGER = StudentConfig(model="vit_tiny_patch16_224", model_args={**VIT, "embed_dim": 16})


def make_hostile_runs(root: Path) -> None:
    """Four recipes, one of which has only begun; every name in them is hostile."""
    names = [name.replace("/", "\u2215") for name in HOSTILE]
    teacher = make_run(
        root / names[0], alone(names[0], description=HOSTILE[1], student=LARGER), 0.9
    )
    for seed in (0, 1, 2):
        make_run(root / f"alone{seed}", alone(f"{names[2]}{seed}", seed), 0.5 + seed / 90)
        make_run(
            root / f"{names[3]}{seed}",
            taught(names[4], seed, description=HOSTILE[5], selector=MaskedKD(keep_rate=0.5)),
            0.7 + seed / 100,
            learnt_from=teacher,
            right=28,
            classes=(HOSTILE[6], HOSTILE[7]),
            environment={HOSTILE[8]: HOSTILE[9], "command": list(HOSTILE[10:])},
        )
    make_run(root / "begun", taught(names[10], teacher=HOSTILE[11]))
