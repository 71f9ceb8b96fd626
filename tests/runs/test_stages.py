"""Stages: one recipe of several runs, each of which is resumed, reused, and never repeated because
of a later one.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from vitdistill.cli import main
from vitdistill.data.augment import Augment
from vitdistill.data.sources.open import open_source
from vitdistill.errors import ConfigError, DataError, Preempted, UserError
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import SoftKD
from vitdistill.recipes.config import Recipe
from vitdistill.recipes.convert import replace_fields
from vitdistill.recipes.settings import (
    DataConfig,
    OptimConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from vitdistill.recipes.stages import STAGES, Stages, dump, load
from vitdistill.recipes.yaml import load_recipe
from vitdistill.runs import label as labelling
from vitdistill.runs.identity import IDENTITY, read_identity, resolve_run
from vitdistill.runs.label import LabelOptions
from vitdistill.runs.networks import build_student, build_teacher_model
from vitdistill.runs.stages import networks_ahead, resolved, train_stages
from vitdistill.storage import checkpoint
from vitdistill.weights import create as weights

pytestmark = pytest.mark.whole

PREEMPTED = 75
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


def write_images(root: Path) -> None:
    """48 training and 12 validation images of 16 x 16, in three classes of another colour each."""
    random = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for label, name in enumerate(("ant", "bee", "cat")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 150, (16, 16, 3))
                pixels[..., label] += 60
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i:02d}.png")


def three() -> Stages:
    """Two epochs of three steps each: from nothing, from its weights at another size, and a fresh
    student taught by that.
    """
    plain = Recipe(
        student=StudentConfig(model="vit_tiny_patch16_224", model_args=VIT),
        data=DataConfig(dir="images", workers=0, augment=Augment(crop="pad", crop_padding=2)),
        optim=OptimConfig(lr=2e-3, warmup_epochs=1.0),
        train=TrainConfig(epochs=2, batch_size=16, log_every=1, save_every=2, eval_batch_size=4),
    )
    return Stages(
        name="three",
        description="pre-trained, fine-tuned, distilled",
        stages={
            "pretrain": plain,
            "finetune": replace(
                plain, student=StudentConfig(model="stage:pretrain", image_size=24, drop_path=0.2)
            ),
            "distill": replace(
                plain,
                teachers={"teacher": TeacherConfig(model="stage:finetune")},
                objectives={"ce": CrossEntropy(weight=0.5), "kd": SoftKD(weight=0.5)},
            ),
        },
    )


def run(output: Path | str, stages: Stages | None = None, **options: Any) -> dict[str, Any]:
    return train_stages(stages or three(), output, device="cpu", **options)


def tree(root: Path) -> dict[str, tuple[str, int]]:
    """Every file with its digest and the time it was written."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(root)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in files
    }


def result(folder: Path) -> dict[str, Any]:
    """What a stage computed."""
    summary = json.loads((folder / "summary.json").read_bytes())
    files = ("metrics.jsonl", "last/model.safetensors", "best/model.safetensors")
    return {
        **{name: (folder / name).read_bytes() for name in files},
        "summary": {k: v for k, v in summary.items() if k != "seconds"},
    }


def digest(model: torch.nn.Module) -> dict[str, bytes]:
    return {key: value.detach().numpy().tobytes() for key, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, the staged recipe, and its finished run ``runs/o``; what each stage
    began with is in ``began``.
    """
    root = tmp_path_factory.mktemp("home")
    write_images(root / "images")
    (root / "three.yaml").write_text(dump(three()))
    before = Path.cwd()
    os.chdir(root)
    began: dict[str, Any] = {}

    def look(job: Any) -> None:
        began[job.recipe.name] = (
            digest(job.student),
            {name: digest(teacher.model) for name, teacher in job.teachers.items()},
        )

    try:
        summaries = run("runs/o", prepared=look)
        assert [*summaries] == [*began] == ["pretrain", "finetune", "distill"]
        torch.save(began, root / "began.pt")
    finally:
        os.chdir(before)
    return root


@pytest.fixture
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of ``home`` as the current folder."""
    shutil.copytree(home, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    yield tmp_path / "home"


# --- a run in stages -----------------------------------------------------------------------------


def test_each_stage_begins_with_what_an_earlier_one_gave(here: Path) -> None:
    began = torch.load(here / "began.pt", weights_only=True)
    best = weights.create_model(
        "runs/o/pretrain/best", image_size=24
    )  # its positions at the size of the next stage
    assert began["finetune"][0] == digest(best)
    assert began["distill"][1]["teacher"] == digest(weights.create_model("runs/o/finetune/best"))
    assert (
        began["pretrain"][0]
        == began["distill"][0]
        != digest(weights.create_model("runs/o/pretrain/best"))
    )
    for stage in ("pretrain", "finetune", "distill"):
        ended = safetensors.torch.load_file(
            here / "runs" / "o" / stage / "last" / "model.safetensors"
        )
        assert {key: value.numpy().tobytes() for key, value in ended.items()} != began[stage][0]


def test_the_recipe_of_a_stage_runs_alone(here: Path) -> None:
    recipe = load_recipe("runs/o/finetune/recipe.yaml")
    assert recipe.student.model == "runs/o/pretrain" and recipe.name == "finetune"
    assert (
        main(["train", "runs/o/finetune/recipe.yaml", "--output", "alone", "--device", "cpu"]) == 0
    )
    assert result(Path("alone")) == result(Path("runs/o/finetune"))


def test_a_finished_run_is_left_as_it_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(here)
    for words in (
        ["three.yaml", "--output", "runs/o"],
        ["runs/o"],
        ["runs/o", "--output", str(here / "runs" / "o")],
    ):
        assert main(["train", *words, "--device", "cpu"]) == 0
        printed = capsys.readouterr().out
        assert (
            printed.count("is finished already: nothing to do") == 3
            and printed.count("done: top-1") == 3
        )
    assert tree(here) == before
    kept = load("runs/o/stages.yaml")
    assert isinstance(kept, Stages) and kept == replace(three(), name="o")


def test_a_stopped_run_goes_on_in_the_stage_it_was_stopped_in(
    here: Path, interrupt: Callable[..., Any]
) -> None:
    """Stopped in the second stage, as if killed before its last checkpoint, stopped in the third;
    bit by bit the run that never was.
    """
    shutil.copytree("runs/o/pretrain", "runs/p/pretrain")
    kept = {"pretrain": tree(here / "runs/p/pretrain")}
    with pytest.raises(
        Preempted,
        match=r"in the stage 'finetune', stopped by SIGINT at step 4 of 6, .*same command resumes",
    ) as stopped:
        run("runs/p", prepared=interrupt("finetune", 4))
    assert stopped.value.exit_code == PREEMPTED and not Path("runs/p/distill").exists()
    shutil.rmtree("runs/p/finetune/checkpoints/step-00000004")
    with pytest.raises(
        Preempted, match=r"in the stage 'distill', stopped by SIGINT at step 2 of 6"
    ):
        run("runs/p", prepared=interrupt("distill", 2))
    kept["finetune"] = tree(here / "runs/p/finetune")
    assert main(["train", "runs/p", "--device", "cpu"]) == 0
    assert {name: tree(here / "runs" / "p" / name) for name in kept} == kept
    for name in ("pretrain", "finetune", "distill"):
        assert result(here / "runs" / "p" / name) == result(here / "runs" / "o" / name)


def stored() -> Stages:
    """From stored labels of one view, in two epochs, then fine-tuned."""
    plain = replace(three().stages["pretrain"], name="run")
    taught = {"teacher": TeacherConfig(labels="labels/teacher")}
    distill = replace(
        plain,
        teachers=taught,
        objectives={"ce": CrossEntropy(weight=0.5), "kd": SoftKD(weight=0.5)},
    )
    return Stages(
        name="stored",
        stages={
            "distill": distill,
            "finetune": replace(plain, student=StudentConfig(model="stage:distill")),
        },
    )


def test_a_stage_with_stored_labels_goes_on(here: Path, interrupt: Callable[..., Any]) -> None:
    """Its recipe.yaml has the labels' views and seed, which the staged recipe leaves open."""
    (here / "stored.yaml").write_text(dump(stored()))
    live = {
        "teachers.teacher.labels": None,
        "teachers.teacher.model": "runs/o/finetune",
        "data.views": 1,
        "train.seed": 5,
    }
    labelling.label(
        replace_fields(stored().stages["distill"], live),
        "labels",
        LabelOptions(part_size=16),
        device="cpu",
    )
    run("runs/whole", stored())
    data = load_recipe("runs/whole/distill/recipe.yaml").data
    assert (data.views, data.seed) == (1, 5)
    with pytest.raises(
        Preempted, match=r"in the stage 'distill', stopped by SIGINT at step 4 of 6"
    ):
        run("runs/p", stored(), prepared=interrupt("distill", 4))
    for words in (
        ["stored.yaml", "--output", "runs/p"],
        ["runs/p"],
    ):  # once to go on, and once when all is done
        assert main(["train", *words, "--device", "cpu"]) == 0
    before = tree(here)
    assert main(["train", "stored.yaml", "--output", "runs/p", "--device", "cpu"]) == 0
    assert tree(here) == before
    for name in ("distill", "finetune"):
        assert result(here / "runs" / "p" / name) == result(here / "runs" / "whole" / name)


def test_stages_go_on_from_elsewhere_and_after_a_move(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: Callable[..., Any]
) -> None:
    """Stopped in the last stage; where its recipe.yaml would lead from there is a run of other
    weights.
    """
    shutil.copytree("runs/o/pretrain", "runs/p/pretrain")
    with pytest.raises(Preempted):
        run("runs/p", prepared=interrupt("distill", 2))
    for name in ("moved", "elsewhere"):
        (tmp_path / name).mkdir()
    moved, images = shutil.move("runs/p", tmp_path / "moved" / "p"), str(here / "images")
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.copytree(here / "runs" / "o" / "pretrain", "runs/p/finetune")
    taught: dict[str, Any] = {}

    def look(job: Any) -> None:
        taught[job.recipe.name] = digest(job.teachers["teacher"].model)

    run(moved, everywhere({"data.dir": images}), prepared=look)
    expected = torch.load(here / "began.pt", weights_only=True)
    assert taught == {"distill": expected["distill"][1]["teacher"]}
    for name in STAGES_OF_THREE:
        assert result(moved / name) == result(here / "runs" / "o" / name)
    kept = load_recipe(moved / "distill" / "recipe.yaml")
    assert kept.teachers["teacher"].model == "runs/p/finetune"
    before = tree(moved)
    assert main(["train", str(moved), "--data-dir", images, "--device", "cpu"]) == 0
    assert tree(moved) == before


def test_one_stage_at_a_time(here: Path) -> None:
    run("runs/p", until="pretrain")
    assert sorted(path.name for path in Path("runs/p").iterdir()) == ["pretrain", STAGES]
    assert result(here / "runs/p/pretrain") == result(here / "runs/o/pretrain")
    before = tree(here)
    with pytest.raises(ConfigError, match="runs/p/distill, has not begun"):
        resolve_run("runs/p")
    run("runs/p", until="pretrain")
    with pytest.raises(ConfigError, match="'finetune'") as caught:
        run("runs/p", until="finetun")
    assert caught.value.field == "stage" and tree(here) == before


def test_a_folder_of_stages_stands_for_its_last(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resolve_run("runs/o") == "runs/o/distill/best"
    assert resolve_run("runs/o/pretrain") == "runs/o/pretrain/best"
    words = "eval runs/o --data-dir images --workers 0 --device cpu --json"
    assert main(words.split()) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    summary = json.loads(Path("runs/o/distill/summary.json").read_bytes())
    assert scores["top1"] == summary["best_top1"]
    assert main(["export", "runs/o", "--output", "student"]) == 0
    exported, best = (
        digest(weights.create_model(name)) for name in ("./student", "runs/o/distill/best")
    )
    assert exported == best


def _rank(rank: int, port: int, output: str) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    calm = three().stages
    calm["finetune"] = replace_fields(calm["finetune"], {"student.drop_path": 0.0})
    run(output, replace(three(), stages=calm))


def test_two_processes_go_through_the_stages_together(here: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_rank, args=(rank, port, "runs/two")) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    for name in ("pretrain", "finetune", "distill"):
        summary = json.loads(Path("runs/two", name, "summary.json").read_bytes())
        assert summary["steps"] == 6 and summary["processes"] == 2
    one, two = (
        [
            json.loads(line).get("loss", 0.0)
            for line in Path(f"runs/{name}/pretrain/metrics.jsonl").read_text().splitlines()
        ]
        for name in ("o", "two")
    )
    assert max(one) > 1 and one == pytest.approx(two, rel=1e-4)


# --- what has changed ----------------------------------------------------------------------------

STAGES_OF_THREE = ("pretrain", "finetune", "distill")


def stage_trees(output: Path) -> dict[str, Any]:
    return {name: tree(output / name) for name in STAGES_OF_THREE}


def changed(key: str, fields: dict[str, Any], stages: Stages | None = None) -> Stages:
    stages = stages or three()
    return replace(
        stages, stages={**stages.stages, key: replace_fields(stages.stages[key], fields)}
    )


def everywhere(fields: dict[str, Any]) -> Stages:
    stages = three()
    for key in stages.stages:
        stages = changed(key, fields, stages)
    return stages


def refuses(stages: Stages, stage: str, words: str, output: str = "runs/o", **options: Any) -> None:
    """Running the stages has to fail over ``stage`` and to change nothing."""
    before = tree(Path("."))
    with pytest.raises(ConfigError, match=words) as caught:
        run(output, stages, **options)
    assert (caught.value.stage, caught.value.field) == (stage, "name")
    assert tree(Path(".")) == before


def test_a_changed_stage_does_not_repeat_the_one_before(here: Path) -> None:
    other = changed("finetune", {"optim.lr": 0.01})
    refuses(other, "finetune", r"optim\.lr is 0\.01 here and 0\.002 there")
    before = stage_trees(Path("runs/o"))
    renamed = changed("finetune", {"name": "finetune_b"}, other)
    refuses(renamed, "distill", r"teachers\.teacher\.model is 'runs/o/finetune_b' here")
    run("runs/o", changed("distill", {"name": "distill_b"}, renamed))
    assert stage_trees(Path("runs/o")) == before
    assert load_recipe("runs/o/finetune_b/recipe.yaml").student.model == "runs/o/pretrain"
    assert resolve_run("runs/o") == "runs/o/distill_b/best"
    both = tree(here)
    run("runs/o")  # the first one is still there
    assert {name for name, seen in tree(here).items() if seen != both.get(name)} == {
        f"runs/o/{STAGES}"
    }


def test_what_cannot_change_a_result_is_no_change(here: Path) -> None:
    before = stage_trees(Path("runs/o"))
    run("runs/o", everywhere({"data.workers": 1, "train.log_every": 7}))
    assert stage_trees(Path("runs/o")) == before


def test_a_first_stage_trained_anew_is_noticed(here: Path) -> None:
    """A stopped stage that began from the old weights does not go on, a finished one is none."""
    shutil.rmtree("runs/o/pretrain")
    other = changed("pretrain", {"train.seed": 3})
    with pytest.raises(ConfigError, match=r"student\.model has other weights") as caught:
        run("runs/o", other)
    assert caught.value.stage == "finetune"
    Path("runs/o/finetune/summary.json").unlink()
    refuses(other, "finetune", r"student\.model has other weights")
    shutil.rmtree("runs/o/pretrain")
    run("runs/o")  # the same weights again, bit by bit
    assert result(Path("runs/o/distill")) == result(here / "runs/o/distill")


def without_an_image(here: Path) -> dict[str, str]:
    """The images without one of them, in another folder."""
    shutil.copytree(here / "images", here / "fewer")
    (here / "fewer" / "train" / "ant" / "00.png").unlink()
    return {"data.dir": "fewer"}


def test_other_images_are_noticed(here: Path) -> None:
    fewer = without_an_image(here)
    refuses(everywhere(fewer), "pretrain", "training images in fewer are others")
    refuses(changed("distill", fewer), "distill", "training images in fewer are others")
    Path("runs/o/pretrain/summary.json").unlink()
    refuses(everywhere(fewer), "pretrain", "training images in fewer", until="pretrain")
    before = stage_trees(Path("runs/o"))
    run("runs/o", changed("distill", {**fewer, "name": "distill_b"}), until=None)
    after = stage_trees(Path("runs/o"))
    assert {name: after[name] for name in STAGES_OF_THREE[1:]} == {
        name: before[name] for name in STAGES_OF_THREE[1:]
    }
    began = read_identity(Path("runs/o/distill_b"))["training images"]
    assert began == open_source("fewer", "train").fingerprint()


def test_images_may_be_moved_and_are_not_needed_once_all_is_finished(here: Path) -> None:
    before = stage_trees(Path("runs/o"))
    shutil.move("images", "moved")
    run("runs/o", everywhere({"data.dir": "moved"}))
    run("runs/o")
    assert stage_trees(Path("runs/o")) == before


def test_stages_go_on_with_an_image_that_was_replaced_once_that_is_accepted(here: Path) -> None:
    """Stopped over the image in the second stage; the first had read it whole."""
    image = Path("images/train/bee/03.png")
    stages = everywhere({"data.in_memory": False})
    whole, seen = image.read_bytes(), 0

    def damage(module: torch.nn.Module, *_: Any) -> None:
        nonlocal seen
        seen += module.training
        if seen == 3:  # the end of the first epoch
            image.write_bytes(whole[:-40])

    def prepared(job: Any) -> None:
        if job.recipe.name == "finetune":
            job.student.norm.register_forward_hook(damage)

    with pytest.raises(DataError, match=r"bee/03\.png"):
        run("runs/r", stages, prepared=prepared)
    assert any(Path("runs/r/finetune/checkpoints").iterdir())
    Image.new("RGB", (16, 16), (90, 20, 30)).save(image)
    refuses(stages, "pretrain", "training images in images are others", output="runs/r")
    for key in three().stages:
        stages = changed(key, {"train.accept_changed_images": True}, stages)
    assert run("runs/r", stages)["distill"]["steps"] == 6
    now = open_source("images", "train").fingerprint()
    assert read_identity(Path("runs/r/finetune"))["training images"] == now


def test_a_command_that_runs_nothing_leaves_the_recipe_of_the_folder(here: Path) -> None:
    before = tree(here)
    other = changed("finetune", {"optim.lr": 0.01, "name": "finetune_b"})
    other = changed("distill", {"name": "distill_b"}, other)
    run("runs/o", other, until="pretrain")
    assert tree(here) == before and resolve_run("runs/o") == "runs/o/distill/best"
    run("runs/o", other, until="finetune")  # a stage began: now the folder is of this recipe
    with pytest.raises(ConfigError, match="runs/o/distill_b, has not begun"):
        resolve_run("runs/o")


# --- folders that earlier versions wrote ---------------------------------------------------------


def as_earlier_version_wrote(output: Path) -> None:
    """What is in identity.json: in the checkpoints, and in one file beside the stages."""
    starts: dict[str, dict[str, str]] = {}
    for name in STAGES_OF_THREE:
        file = output / name / IDENTITY
        identity = json.loads(file.read_bytes())
        file.unlink()
        sources = {field: identity.pop(field) for field in [*identity] if field.endswith("model")}
        began = {"pretrain": {}, "finetune": {"pretrain": "student.model"}}
        fields = began.get(name, {"finetune": "teachers.teacher.model"})
        starts[name] = {"images/train": identity["training images"]}
        starts[name] |= {source: sources[field] for source, field in fields.items()}
        of_recipe = identity.pop("recipe")
        for folder in (output / name / "checkpoints").iterdir():
            tensors, state = checkpoint.load(folder)
            state |= {"recipe": of_recipe, "identity": identity, "unreadable": None}
            step = int(folder.name.removeprefix("step-"))
            shutil.rmtree(folder)
            checkpoint.save(output / name, step, tensors, state, keep=99)
    (output / "starts.json").write_text(json.dumps(starts))


def test_a_folder_of_an_earlier_version_goes_on_and_is_refused_alike(here: Path) -> None:
    as_earlier_version_wrote(Path("runs/o"))
    before = tree(here)
    run("runs/o")
    assert tree(here) == before
    refuses(everywhere(without_an_image(here)), "pretrain", "training images in fewer are others")
    shutil.copytree("runs/o", "moved/o")
    for name in ("summary.json", "checkpoints/step-00000006"):
        path = Path("moved/o/distill") / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run("moved/o")
    assert result(Path("moved/o/distill")) == result(Path("runs/o/distill"))
    shutil.rmtree("runs/o/pretrain")
    with pytest.raises(ConfigError, match=r"student\.model has other weights"):
        run("runs/o", changed("pretrain", {"train.seed": 3}))


# --- what is refused before anything runs --------------------------------------------------------


@pytest.mark.parametrize(
    ("prepare", "stage"),
    [
        (lambda: Path("x").mkdir() or Path("x/notes.txt").touch(), ""),
        (lambda: shutil.copytree("runs/o/pretrain", "x"), ""),
        (lambda: Path("x").touch(), "pretrain"),
        (lambda: Path("x/finetune/sub").mkdir(parents=True), "finetune"),
    ],
)
def test_a_folder_of_something_else_is_left_alone(
    prepare: Callable[[], Any], stage: str, here: Path
) -> None:
    prepare()
    before = tree(here)
    with pytest.raises(ConfigError) as caught:
        run("x")
    assert (caught.value.stage, caught.value.field) == (stage, "output")
    assert tree(here) == before


TAUGHT: dict[str, Any] = {
    "objectives": {"kd": {"method": "kd"}},
    "teachers": {"teacher": {"model": "vit_tiny_patch16_224"}},
}
TYPO = {"teachers": {"teacher": {"model": "vit_tiny_patch16_224", "checkpoint": "typo.pth"}}}


@pytest.mark.parametrize(
    ("stage", "fields", "words"),
    [
        ("finetune", {"selector": {"method": "maskedkd"}}, "teacher"),
        ("distill", {"data.dir": "nowhere"}, "nowhere"),
        ("finetune", {"data.dir": ""}, "images"),
        ("finetune", {"data.dir": "flat"}, "labels"),
        ("finetune", {"data.dir": "single"}, "one class"),
        ("finetune", {"student.model_args.dept": 3}, "dept"),
        ("distill", {"student.model": "vit_tinny"}, "vit_tinny"),
        ("finetune", {"optim.opt": "adamwx"}, "'adamw'"),
        ("distill", {"optim.opt_args": {"beta": 1}}, "adamw"),
        ("finetune", {"train.batch_size": 64}, "48 images"),
        ("finetune", {"train.accumulate": 3}, "divide"),
        ("distill", {"train.accumulate": 16, "data.augment.mixup": 0.5}, "mixup"),
        ("finetune", TAUGHT, "random weights"),
        ("finetune", TAUGHT | TYPO, "typo.pth"),
    ],
)
def test_a_mistake_in_a_later_stage_is_found_before_the_first(
    stage: str, fields: dict[str, Any], words: str, here: Path
) -> None:
    for split in ("train", "val"):
        shutil.copytree(here / "images" / split / "ant", here / "flat", dirs_exist_ok=True)
        shutil.copytree(here / "images" / split / "ant", here / "single" / split / "ant")
    before = tree(here)
    with pytest.raises(UserError, match=words) as caught:
        run("x", changed(stage, fields))
    assert caught.value.stage == stage
    assert tree(here) == before


# --- before anything has run ---------------------------------------------------------------------


def test_a_network_is_foreseen_as_it_will_be(here: Path) -> None:
    """Architecture, sizes, classes and parameters of student and teacher, against those built from
    the folders.
    """
    stages = three()
    before: dict[str, int] = {}
    for key in stages.stages:
        _, student, teachers = networks_ahead(stages, key, 3, before)
        recipe = resolved(stages, key, Path("runs/o"))
        real = build_student(recipe.student, 3)
        assert replace(student.network, architecture="") == replace(real.network, architecture="")
        assert (
            student.spec.image_size
            == real.spec.image_size
            == ((24, 24) if key == "finetune" else (16, 16))
        )
        for name, built in teachers.items():
            there = build_teacher_model(recipe.teachers[name], name)
            assert replace(built.network, architecture="") == replace(
                there.network, architecture=""
            )
            assert {k: v.shape for k, v in built.model.state_dict().items()} == {
                k: v.shape for k, v in there.model.state_dict().items()
            }


def test_explaining_stages_that_have_not_run(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree("runs")
    before = tree(here)
    assert main(["explain", "three.yaml"]) == 0
    printed = capsys.readouterr().out
    headings = (
        "Stage 1 of 3: pretrain",
        "finetune, student from pretrain",
        "teacher from finetune",
    )
    places = [printed.index(heading) for heading in headings]
    assert places == sorted(places) and "36 of 36 patches" in printed[places[1] : places[2]]
    rows = [line.split() for line in printed[printed.index("  all stages") :].splitlines()[2:]]
    counts = {row[0]: float(row[-2].replace(",", "")) for row in rows if row[-1:] == ["MFLOPs"]}
    assert [*counts] == [*three().stages, "together"]
    together = counts.pop("together")
    assert sum(counts.values()) == pytest.approx(together, rel=0.01)
    assert counts["finetune"] / counts["pretrain"] == pytest.approx(37 / 17, rel=0.1)
    assert main(["explain", "three.yaml", "--recipe-yaml"]) == 0
    assert capsys.readouterr().out == dump(three())
    assert tree(here) == before
