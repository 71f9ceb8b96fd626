"""Stages: one recipe of several runs, each of which is resumed, reused, and never repeated because
of a later one.
"""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitdistill.cli import main
from vitdistill.cli.explain import ExplainFlags
from vitdistill.cli.flags import flags_of
from vitdistill.cli.recipe_flags import EVERY, FIRST, STAGED, TAUGHT, parse
from vitdistill.data.augment import Augment
from vitdistill.data.source import open_source
from vitdistill.errors import ConfigError, DataError, Preempted, UserError
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import SoftKD
from vitdistill.recipes import RECIPES, find_recipe, named_recipe
from vitdistill.recipes.config import (
    VOLATILE,
    DataConfig,
    OptimConfig,
    Recipe,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
    dump_recipe,
    flatten,
    load_recipe,
    replace_fields,
    to_dict,
)
from vitdistill.runs import label as labelling
from vitdistill.runs.label import LabelOptions
from vitdistill.runs.networks import build_student, build_teacher_model, resolve_run
from vitdistill.runs.stages import (
    IMAGES,
    STAGES,
    STARTS,
    Stages,
    dump,
    in_stage,
    load,
    networks_ahead,
    resolved,
    sources,
    train_stages,
)
from vitdistill.weights import create as weights

pytestmark = pytest.mark.whole

USAGE, DATA, PREEMPTED, CONFIG = 64, 65, 75, 78
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


Refused = Callable[..., str]


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """The one sentence of a command that has to fail and change nothing."""

    def say(*words: str, code: int) -> str:
        before = tree(here)
        capsys.readouterr()
        found = main([*words, "--device", "cpu"] if words[0] == "train" else [*words])
        captured = capsys.readouterr()
        assert found == code, captured.err
        assert words[0] != "explain" or captured.out == ""
        assert captured.err.count("\n") == 1 and "Traceback" not in captured.err + captured.out
        assert tree(here) == before
        return captured.err

    return say


# --- what a staged recipe is ---------------------------------------------------------------------


graphs = st.lists(
    st.tuples(st.none() | st.integers(0, 4), st.sets(st.integers(0, 4), max_size=2)),
    min_size=2,
    max_size=4,
)


@settings(max_examples=60)
@given(graph=graphs)
def test_a_stage_builds_on_earlier_ones_and_none_is_for_nothing(
    graph: list[tuple[int | None, set[int]]],
) -> None:
    """Any graph of students and teachers, against the rule as one line; and what is valid survives
    YAML.
    """
    recipes = {}
    for i, (student, teachers) in enumerate(graph):
        model = "deit_tiny_patch16_224" if student is None else f"stage:s{student}"
        objectives = {"ce": CrossEntropy(), **{f"kd{t}": SoftKD(teacher=f"t{t}") for t in teachers}}
        configs = {f"t{t}": TeacherConfig(model=f"stage:s{t}") for t in teachers}
        recipes[f"s{i}"] = Recipe(
            student=StudentConfig(model=model), teachers=configs, objectives=objectives
        )
    used = [{s for s in (student, *teachers) if s is not None} for student, teachers in graph]
    valid = all(s < i for i, of in enumerate(used) for s in of) and set().union(*used) >= set(
        range(len(graph) - 1)
    )
    if not valid:
        with pytest.raises(ConfigError, match="stage"):
            Stages(name="any", stages=recipes)
        return
    stages = Stages(name="any", stages=recipes)
    assert [recipe.name for recipe in stages.stages.values()] == [*recipes]
    for i, recipe in enumerate(stages.stages.values()):
        assert set(sources(recipe).values()) == {f"s{s}" for s in used[i]}


def test_a_staged_recipe_survives_yaml(tmp_path: Path) -> None:
    stages = replace(three(), description="no: yes")
    (tmp_path / "a.yaml").write_text(dump(stages))
    assert load(tmp_path / "a.yaml") == stages == find_recipe(str(tmp_path / "a.yaml"))
    (tmp_path / "b.yaml").write_text(dump_recipe(stages.last))
    assert load(tmp_path / "b.yaml") == stages.last
    with pytest.raises(ConfigError, match=r"a\.yaml has stages, and that of one run is needed"):
        load_recipe(tmp_path / "a.yaml")


def test_named_recipes_in_stages_survive_yaml(tmp_path: Path) -> None:
    for name in RECIPES:
        stages = named_recipe(name)
        if isinstance(stages, Stages):
            assert stages.name == name and stages.description
            (tmp_path / "named.yaml").write_text(dump(stages))
            assert load(tmp_path / "named.yaml") == stages
            assert yaml.safe_load(dump(stages)) == to_dict(stages)


def test_a_stage_is_called_as_its_recipe_or_as_its_key() -> None:
    stages = three().stages
    named = Stages(stages={**stages, "pretrain": replace(stages["pretrain"], name="base")})
    assert [recipe.name for recipe in named.stages.values()] == ["base", "finetune", "distill"]


CHANGES: list[tuple[str, str, Any, str]] = [
    (
        "finetune",
        "student.model",
        "stage:pretrian",
        r"finetune.student.model is 'stage:pretrian', but there is no stage .* 'pretrain'\?",
    ),
    ("finetune", "student.model", "stage:", "there is no stage ''"),
    ("finetune", "student.model", "stage:finetune", "cannot begin with its own end"),
    ("pretrain", "student.model", "stage:distill", "'distill' comes after 'pretrain'"),
    (
        "distill",
        "teachers.teacher.model",
        "stage:nothing",
        "distill.teachers.teacher.model is .* before 'distill' are pretrain, finetune",
    ),
    (
        "distill",
        "teachers.teacher.model",
        "vit_tiny_patch16_224",
        "no later stage uses what the stage 'finetune' trains",
    ),
    (
        "finetune",
        "student.model",
        "vit_tiny_patch16_224",
        "no later stage uses what the stage 'pretrain' trains",
    ),
    (
        "finetune",
        "student.checkpoint",
        "a.pth",
        "student.checkpoint would take the place of the weights of 'stage:pretrain'",
    ),
    ("finetune", "student.pretrained", True, "student.pretrained would take the place"),
    ("finetune", "student.checkpoint", "stage:pretrain", "name it in student.model"),
    (
        "distill",
        "teachers.teacher.checkpoint",
        "stage:pretrain",
        "name it in teachers.teacher.model",
    ),
    ("finetune", "name", "pretrain", "'pretrain' and 'finetune' would share the folder 'pretrain'"),
    ("finetune", "name", STAGES, "which is a file beside the stages"),
]


@pytest.mark.parametrize(("key", "field", "value", "sentence"), CHANGES)
def test_stages_that_cannot_be(key: str, field: str, value: Any, sentence: str) -> None:
    stages = three().stages
    with pytest.raises(ConfigError, match=sentence) as caught:
        Stages(name="x", stages={**stages, key: replace_fields(stages[key], {field: value})})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stages: {}", "at least two stages"),
        ("stages: {a: {}}", "at least two stages"),
        ("stages: [a, b]", "stages in .*mine.yaml is .*: a mapping of recipes"),
        ("stages: null", "a mapping of recipes"),
        ("stages: {a-b: {}, c: {student: {model: 'stage:a-b'}}}", "the name of a stage is 'a-b'"),
        ("stages: {a: {}, a: {}}", "'a' is given twice"),
        ("stages: {a: {}, 5: {}}", "the key 5 is not text"),
        ("nam: x\nstages: {a: {}, b: {}}", r"unknown field 'nam' \(did you mean 'name'\?\)"),
        (
            "optim: {}\nstages: {a: {}, b: {}}",
            "'optim': in a staged recipe it is a field of each stage, stages.NAME.optim",
        ),
        ("name: 5\nstages: {a: {}, b: {}}", "name in .*mine.yaml is 5: text is needed"),
        ("name: a/b\nstages: {a: {}, b: {student: {model: 'stage:a'}}}", "plain name of a folder"),
        (
            "stages: {a: {optm: {}}, b: {}}",
            r"the stage 'a' of .*mine.yaml has an unknown field 'optm' \(did you mean 'optim'\?\)",
        ),
        (
            "stages: {a: {}, b: {optim: {lr: fast}}}",
            "optim.lr in the stage 'b' of .*mine.yaml is 'fast': a number is needed",
        ),
        (
            "stages: {a: {}, b: {train: {epochs: 0}}}",
            "in the stage 'b' of .*mine.yaml, train.epochs is 0",
        ),
        ("stages: {a: {}, b: 3}", "the stage 'b' of .* is 3: a mapping"),
        ("stages: {a: {}, b: {}}", "no later stage uses what the stage 'a' trains"),
        ("stages:\n  a: {}\n  b: [", "line 3 is not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=sentence) as caught:
        load(tmp_path / "mine.yaml")
    assert "mine.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_the_recipe_of_the_documentation_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "stages.md").read_text()
    (code,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(code)
    stages = load(tmp_path / "mine.yaml")
    assert isinstance(stages, Stages) and [*stages.stages] == ["pretrain", "finetune", "distill"]
    for scope in (EVERY, FIRST):
        line = next(
            line
            for line in text.splitlines()
            if line.startswith("| `--") and line.rstrip("|").count(scope)
        )
        for flag in flags_of(ExplainFlags):
            if STAGED.get(flag.field.name) == scope:
                assert flag.name in line


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
    shutil.move("runs/p", tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.copytree(here / "runs" / "o" / "pretrain", "runs/p/finetune")
    again = [
        "train",
        str(tmp_path / "moved" / "p"),
        "--data-dir",
        str(here / "images"),
        "--device",
        "cpu",
    ]
    began: dict[str, Any] = {}
    stages = load(tmp_path / "moved" / "p" / STAGES)
    assert isinstance(stages, Stages)
    images = {
        key: replace_fields(recipe, {"data.dir": str(here / "images")})
        for key, recipe in stages.stages.items()
    }

    def look(job: Any) -> None:
        began[job.recipe.name] = {
            name: digest(teacher.model) for name, teacher in job.teachers.items()
        }

    run(tmp_path / "moved" / "p", replace(stages, stages=images), prepared=look)
    expected = torch.load(here / "began.pt", weights_only=True)
    assert began == {"distill": expected["distill"][1]}
    for name in ("pretrain", "finetune", "distill"):
        assert result(tmp_path / "moved" / "p" / name) == result(here / "runs" / "o" / name)
    assert (
        load_recipe(tmp_path / "moved/p/distill/recipe.yaml").teachers["teacher"].model
        == "runs/p/finetune"
    )
    before = tree(tmp_path / "moved")
    assert main(again) == 0
    assert tree(tmp_path / "moved") == before


def test_one_stage_at_a_time(here: Path, refused: Refused) -> None:
    words = ["train", "three.yaml", "--output", "runs/p", "--stage"]
    assert main([*words, "pretrain", "--device", "cpu"]) == 0
    assert sorted(path.name for path in Path("runs/p").iterdir()) == ["pretrain", STAGES, STARTS]
    assert result(here / "runs/p/pretrain") == result(here / "runs/o/pretrain")
    assert "the last stage in runs/p has not begun" in refused(
        "export", "runs/p", "--output", "x", code=CONFIG
    )
    assert main([*words, "pretrain", "--device", "cpu"]) == 0
    assert not Path("runs/p/finetune").exists()
    assert "there is no stage 'finetun': did you mean 'finetune'?" in refused(
        *words, "finetun", code=CONFIG
    )
    assert "choose from pretrain, finetune, distill" in refused(*words, "zzz", code=CONFIG)
    assert "has no stages" in refused("train", "runs/o/pretrain", "--stage", "finetune", code=USAGE)


def test_a_folder_of_stages_stands_for_its_last(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        resolve_run("runs/o") == "runs/o/distill/best"
        and resolve_run("runs/o/pretrain") == "runs/o/pretrain/best"
    )
    assert (
        main(
            [
                "eval",
                "runs/o",
                "--data-dir",
                "images",
                "--workers",
                "0",
                "--device",
                "cpu",
                "--json",
            ]
        )
        == 0
    )
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (
        scores["top1"] == json.loads(Path("runs/o/distill/summary.json").read_bytes())["best_top1"]
    )
    assert main(["export", "runs/o", "--output", "student"]) == 0
    assert digest(weights.create_model("./student")) == digest(
        weights.create_model("runs/o/distill/best")
    )


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


def test_a_changed_stage_does_not_repeat_the_one_before(here: Path, refused: Refused) -> None:
    words = ["train", "runs/o", "--set", "finetune.optim.lr=0.01"]
    sentence = refused(*words, code=CONFIG)
    assert (
        "runs/o/finetune holds the stage 'finetune' as it was before (optim.lr is 0.01 here and"
        " 0.002 there)" in sentence
    )
    assert "--set finetune.name=finetune_b distill.name=distill_b" in sentence
    before = {
        name: tree(here / "runs" / "o" / name) for name in ("pretrain", "finetune", "distill")
    }
    assert (
        main([*words, "finetune.name=finetune_b", "distill.name=distill_b", "--device", "cpu"]) == 0
    )
    assert {name: tree(here / "runs" / "o" / name) for name in before} == before
    assert load_recipe("runs/o/finetune_b/recipe.yaml").student.model == "runs/o/pretrain"
    assert (
        load_recipe("runs/o/distill_b/recipe.yaml").teachers["teacher"].model == "runs/o/finetune_b"
    )
    kept = load("runs/o/stages.yaml")
    assert (
        isinstance(kept, Stages)
        and kept.stages["finetune"].optim.lr == 0.01
        and resolve_run("runs/o") == "runs/o/distill_b/best"
    )
    both = tree(here)
    assert (
        main(["train", "three.yaml", "--output", "runs/o", "--device", "cpu"]) == 0
    )  # the first one is still there
    assert {name for name, seen in tree(here).items() if seen != both.get(name)} == {
        f"runs/o/{STAGES}"
    }
    third = refused(*words[:-1], "finetune.optim.lr=0.02", code=CONFIG)
    assert "--set finetune.name=finetune_c distill.name=distill_c" in third


def test_a_changed_first_stage_takes_all_others_along(here: Path, refused: Refused) -> None:
    names = ["pretrain.name=pretrain_b", "finetune.name=finetune_b", "distill.name=distill_b"]
    assert f"--set {' '.join(names)}" in refused(
        "train", "runs/o", "--set", "pretrain.train.seed=1", code=CONFIG
    )
    sentence = refused("train", "runs/o", "--set", "pretrain.train.seed=1", names[0], code=CONFIG)
    assert "student.model is 'runs/o/pretrain_b' here and 'runs/o/pretrain' there" in sentence
    assert f"--set {' '.join(names[1:])}" in sentence


def test_what_cannot_change_a_result_is_no_change(here: Path) -> None:
    before = {
        name: tree(here / "runs" / "o" / name) for name in ("pretrain", "finetune", "distill")
    }
    assert main(["train", "runs/o", "--workers", "1", "--log-every", "7", "--device", "cpu"]) == 0
    assert {name: tree(here / "runs" / "o" / name) for name in before} == before


def test_a_first_stage_trained_anew_is_noticed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same path, other weights: a stopped stage that began from the old ones does not go on, a
    finished one does not pass.
    """
    again = ["train", "three.yaml", "--output", "runs/o", "--device", "cpu"]
    shutil.move("runs/o/pretrain", "old")
    Path("runs/o/finetune/summary.json").unlink()
    other = [*again, "--set", "pretrain.train.seed=3"]
    for _ in range(2):  # once it is trained, and then at once
        assert main(other) == CONFIG
        sentence = capsys.readouterr().err
        assert (
            "it began from other weights of 'pretrain' than are in runs/o/pretrain now" in sentence
        )
        assert "--set finetune.name=finetune_b distill.name=distill_b" in sentence
    shutil.move("runs/o/finetune", "finetune")
    assert main(other) == CONFIG
    assert "in the stage 'distill', runs/o/distill holds" in capsys.readouterr().err
    for name in ("pretrain", "finetune"):
        shutil.rmtree(f"runs/o/{name}")
    shutil.move("old", "runs/o/pretrain")
    shutil.move("finetune", "runs/o/finetune")
    assert main(again) == CONFIG  # what finetune began from was noted anew
    Path("runs/o", STARTS).unlink()
    assert main(again) == 0


def other_images(here: Path) -> None:
    """The images in ``images``, and the same without one in ``fewer``."""
    shutil.copytree(here / "images", here / "fewer")
    (here / "fewer" / "train" / "ant" / "00.png").unlink()


def test_other_images_are_noticed(here: Path, refused: Refused) -> None:
    """With the same names, with a new name for the last stage alone, and in a stage that has
    begun.
    """
    other_images(here)
    again = ["train", "three.yaml", "--output", "runs/o", "--data-dir", "fewer"]
    sentence = refused(*again, code=CONFIG)
    assert (
        "runs/o/pretrain holds the stage 'pretrain' as it was before (it was trained on other"
        " images than are in fewer now)" in sentence
    )
    assert (
        "--set pretrain.data.dir=images finetune.data.dir=images distill.data.dir=images, or keep"
        " both" in sentence
    )
    assert (
        "--set pretrain.name=pretrain_b finetune.name=finetune_b distill.name=distill_b, or another"
        " --output" in sentence
    )
    last = [*again, "--set", "distill.name=distill_b"]
    assert (
        "--set pretrain.data.dir=images finetune.data.dir=images distill.data.dir=fewer, or"
        in refused(*last, code=CONFIG)
    )
    assert "there is no folder or file 'nowhere'" in refused(*again[:-1], "nowhere", code=DATA)
    assert "in the stage 'pretrain', there is no" in refused(
        *again[:-1], "nowhere", "--stage", "pretrain", code=DATA
    )
    Path("runs/o/pretrain/summary.json").unlink()
    assert "the stage 'pretrain' as it was before (it was trained on other" in refused(
        *again, "--stage", "pretrain", code=CONFIG
    )


def test_a_stage_keeps_its_images_beside_another_with_others(here: Path) -> None:
    other_images(here)
    before = {
        name: tree(here / "runs" / "o" / name) for name in ("pretrain", "finetune", "distill")
    }
    own = [
        "pretrain.data.dir=images",
        "finetune.data.dir=images",
        "distill.data.dir=fewer",
        "distill.name=distill_b",
    ]
    assert (
        main(["train", "three.yaml", "--output", "runs/o", "--device", "cpu", "--set", *own]) == 0
    )
    assert {name: tree(here / "runs" / "o" / name) for name in before} == before
    kept = load("runs/o/stages.yaml")
    assert isinstance(kept, Stages) and [recipe.data.dir for recipe in kept.stages.values()] == [
        "images",
        "images",
        "fewer",
    ]
    starts = json.loads(Path("runs/o", STARTS).read_bytes())
    found = {place: open_source(place, "train").fingerprint() for place in ("images", "fewer")}
    assert {name: began[IMAGES] for name, began in starts.items()} == {
        **dict.fromkeys(before, found["images"]),
        "distill_b": found["fewer"],
    }


def test_images_that_were_moved_or_changed_in_place(here: Path, refused: Refused) -> None:
    before = {
        name: tree(here / "runs" / "o" / name) for name in ("pretrain", "finetune", "distill")
    }
    again = ["train", "three.yaml", "--output", "runs/o", "--device", "cpu"]
    shutil.move("images", "moved")
    assert main([*again, "--data-dir", "moved"]) == 0
    assert main(again) == 0  # finished, and the images it names are gone
    assert {name: tree(here / "runs" / "o" / name) for name in before} == before
    shutil.copytree("moved", "images")
    Path("images/train/bee/03.png").unlink()
    sentence = refused(*again[:-2], code=CONFIG)
    assert (
        "other images than are in images now): keep both by giving new folders, --set"
        " pretrain.name=pretrain_b " in sentence
    )


def test_a_stage_goes_on_with_an_image_that_was_replaced(here: Path) -> None:
    """It stopped over the image; the stage before had read it, whole. One that has learnt nothing
    yet begins with any images.
    """
    stages = three()
    stages = replace(
        stages,
        stages={
            key: replace_fields(recipe, {"data.in_memory": False})
            for key, recipe in stages.stages.items()
        },
    )
    image = Path("images/train/bee/03.png")
    seen = 0

    def damage(module: torch.nn.Module, *_: Any) -> None:
        nonlocal seen
        seen += module.training
        if seen == 3:  # the end of the first epoch
            image.write_bytes(image.read_bytes()[:-40])

    def prepared(job: Any) -> None:
        if job.recipe.name == "finetune":
            job.student.norm.register_forward_hook(damage)

    with pytest.raises(
        DataError, match=r"in the stage 'finetune', .*bee/03\.png: the image is damaged"
    ):
        run("runs/r", stages, prepared=prepared)
    assert any(Path("runs/r/finetune/checkpoints").iterdir())
    Image.new("RGB", (16, 16), (90, 20, 30)).save(image)
    for _ in range(2):
        assert run("runs/r", stages)["distill"]["steps"] == 6
        starts = json.loads(Path("runs/r", STARTS).read_bytes())
        assert {began[IMAGES] for began in starts.values()} == {
            open_source("images", "train").fingerprint()
        }
    shutil.rmtree("runs/r/distill/checkpoints")
    Path("runs/r/distill/summary.json").unlink()
    other_images(here)
    run(
        "runs/r",
        replace(
            stages,
            stages={
                **stages.stages,
                "distill": replace_fields(stages.stages["distill"], {"data.dir": "fewer"}),
            },
        ),
    )
    now = json.loads(Path("runs/r", STARTS).read_bytes())
    assert now.pop("distill")[IMAGES] == open_source("fewer", "train").fingerprint()
    assert now == {name: began for name, began in starts.items() if name != "distill"}


def test_a_command_that_runs_nothing_leaves_the_recipe_of_the_folder(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(here)
    renamed = [
        "--set",
        "finetune.optim.lr=0.01",
        "finetune.name=finetune_b",
        "distill.name=distill_b",
    ]
    words = ["train", "three.yaml", "--output", "runs/o", "--device", "cpu", *renamed, "--stage"]
    assert main([*words, "pretrain"]) == 0
    assert tree(here) == before and resolve_run("runs/o") == "runs/o/distill/best"
    assert main([*words, "finetune"]) == 0  # a stage began: now the folder is of this recipe
    with pytest.raises(
        ConfigError,
        match=(
            r"runs/o/distill_b is not there: name a finished run, .*runs/o/distill or"
            r" .*finetune_b or "
        ),
    ):
        resolve_run("runs/o")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "accept it (--set objectives.dmae.any_teacher=true)",
            "accept it (--set s.objectives.dmae.any_teacher=true)",
        ),
        ("(--set selector.teachers='[NAME]')", "(--set s.selector.teachers='[NAME]')"),
        ("--set optim.lr=1 train.epochs=2 or so", "--set s.optim.lr=1 s.train.epochs=2 or so"),
        ("--set name=x", "--set s.name=x"),
        (
            "--set teachers.t.model=a data.dir=b, or leave it",
            "--set s.teachers.t.model=a s.data.dir=b, or leave it",
        ),
        ("--set other.name=b s.name=c", "--set other.name=b s.name=c"),
        ("--set s.optim.lr=1", "--set s.optim.lr=1"),
        ("--set 'optim' has no '='", "--set 'optim' has no '='"),
        ("add one (--with random_masking:teacher)", "add one (--with s.random_masking:teacher)"),
        ("leave it out (--without ce) to", "leave it out (--without s.ce) to"),
        ("drop ce or kd (--without)", "drop ce or kd (--without)"),
        ("give --with or --without", "give --with or --without"),
        (
            "x: warm up for fewer (--warmup-epochs)",
            "x: warm up for fewer (--set s.optim.warmup_epochs=VALUE)",
        ),
        (
            "x: lower --lr, or use --amp-dtype float32",
            "x: lower --set s.optim.lr=VALUE, or use --set s.train.amp_dtype=float32",
        ),
        ("x: set --views 2, or label more", "x: give --set s.data.views=2, or label more"),
        ("x: see less (--keep-rate 0.25).", "x: see less (--set s.selector.keep_rate=0.25)."),
        (
            "x: give --teacher-path FILE, --pretrained",
            "x: give --set s.teachers.teacher.checkpoint=FILE, --set s.student.pretrained=true",
        ),
        (
            "x: pass --reorder-classes to match",
            "x: pass --set s.teachers.teacher.reorder_classes=true to match",
        ),
        (
            "x: give --sched none or --clip-grad none",
            "x: give --set s.optim.sched=none or --set s.optim.clip_grad=null",
        ),
        (
            "--keep-rate and --num-keep both say it: give one",
            "--keep-rate and --num-keep both say it: give one",
        ),
        ("x: give --data-dir, a folder", "x: give --data-dir, a folder"),
        ("x: label with --encoding float16", "x: label with --encoding float16"),
    ],
)
def test_a_sentence_names_the_flags_of_its_stage(text: str, expected: str) -> None:
    with pytest.raises(DataError) as caught, in_stage("s"):
        raise DataError(text)
    assert str(caught.value) == f"in the stage 's', {expected}"
    with pytest.raises(DataError) as again, in_stage("t"):
        raise caught.value
    assert str(again.value) == str(caught.value)


def test_an_error_stays_what_it_is_in_a_stage() -> None:
    error = DataError("this is wrong")
    error.agreed, error.image = True, ("train", "a.png")
    with pytest.raises(DataError) as caught, in_stage("s"):
        raise error
    assert caught.value.agreed and caught.value.image == ("train", "a.png")


def test_a_sentence_names_every_flag_as_its_stage_takes_it() -> None:
    """And the field is one of the recipe, where it has such a part."""
    stages = three().stages
    known = [flag for flag in flags_of(ExplainFlags) if "path" in flag.field.metadata]
    assert len(known) > 40
    for flag in known:
        path, kind, choices = (
            flag.field.metadata["path"],
            flag.value.kind,
            get_args(flag.value.kind),
        )
        word = choices[-1] if choices else {bool: "true", str: "FILE"}.get(kind, "7")
        for key, size in (
            ("finetune", "student.image_size"),
            ("distill", "student.model_args.img_size"),
        ):
            with pytest.raises(DataError) as caught, in_stage(key, stages[key]):
                raise DataError(f"this is wrong: give {flag.name} {word}, or none")
            path = size if flag.field.name == "img_size" else path
            given = f"{flag.name} {word}" if path in VOLATILE else f"--set {key}.{path}={word}"
            assert (
                str(caught.value) == f"in the stage {key!r}, this is wrong: give {given}, or none"
            )
            parts = path.split(".")
            assert path in flatten(stages[key]) or parts[0] in (
                "selector",
                "teachers",
                "objectives",
            ), path


def test_a_mistake_in_a_stage_is_mended_by_what_the_sentence_says(bare: Path) -> None:
    assert "(--set pretrain.optim.warmup_epochs=VALUE)" in sentence_of(
        "--set", "pretrain.train.epochs=1", code=CONFIG
    )
    assert (
        composed("--set", "pretrain.train.epochs=1", "pretrain.optim.warmup_epochs=0")["pretrain"][
            "train.epochs"
        ]
        == 1
    )


def test_unequal_grids_are_mended_in_their_stage(here: Path, refused: Refused) -> None:
    words = ["train", "three.yaml", "--output", "x", "--with", "distill.random_masking"]
    sizes = ["distill.student.model_args.img_size", "distill.teachers.teacher.image_size"]
    assert f"(--set {sizes[0]}=PIXELS, --set {sizes[1]}=PIXELS)" in refused(*words, code=CONFIG)


def test_damaged_notes_are_named(here: Path, refused: Refused) -> None:
    Path("runs/o", STARTS).write_text("[")
    assert f"runs/o/{STARTS} is damaged" in refused("train", "runs/o", code=DATA)


@pytest.mark.parametrize(
    ("prepare", "sentence", "code"),
    [
        (
            lambda: Path("x").mkdir() or Path("x/notes.txt").touch(),
            "the output x is not empty (notes.txt is in it)",
            CONFIG,
        ),
        (
            lambda: shutil.copytree("runs/o/pretrain", "x"),
            "the output x holds a run without stages",
            CONFIG,
        ),
        (lambda: Path("x").touch(), "needs a folder where the file x is", CONFIG),
        (
            lambda: Path("x/finetune/sub").mkdir(parents=True),
            "in the stage 'finetune', the output x/finetune is not empty",
            CONFIG,
        ),
    ],
)
def test_a_folder_of_something_else_is_left_alone(
    prepare: Callable[[], Any], sentence: str, code: int, here: Path, refused: Refused
) -> None:
    prepare()
    assert sentence in refused("train", "three.yaml", "--output", "x", code=code)


BY_NOBODY = [
    "--with",
    "finetune.kd",
    "--set",
    "finetune.teachers.teacher.model=vit_tiny_patch16_224",
]


@pytest.mark.parametrize(
    ("words", "sentence", "code"),
    [
        (
            ["--with", "distill.maskedkd", "--without", "distill.kd", "distill.ce"],
            "in the stage 'distill', there is no objective",
            CONFIG,
        ),
        (
            ["--with", "finetune.maskedkd"],
            (
                "in the stage 'finetune', MaskedKD chooses the patches a teacher sees, but no"
                " teacher runs"
            ),
            CONFIG,
        ),
        (
            ["--set", "distill.data.dir=nowhere"],
            "in the stage 'distill', there is no folder or file 'nowhere'",
            DATA,
        ),
        (["--set", "finetune.data.dir=''"], "in the stage 'finetune', no images are named", CONFIG),
        (
            ["--set", "finetune.data.dir=flat"],
            "or stop before this stage (--stage pretrain)",
            CONFIG,
        ),
        (
            ["--set", "finetune.data.dir=flat"],
            "name images in class folders (--set finetune.data.dir=FOLDER)",
            CONFIG,
        ),
        (
            ["--set", "finetune.data.dir=flat"],
            "in the stage 'finetune', the objective 'ce' needs labels",
            CONFIG,
        ),
        (
            ["--set", "finetune.student.model_args.dept=3"],
            "in the stage 'finetune', vit_tiny_patch16_224 takes no argument 'dept'",
            CONFIG,
        ),
        (["--set", "distill.student.model=vit_tinny"], "in the stage 'distill', timm", CONFIG),
        (
            ["--set", "finetune.optim.opt=adamwx"],
            "in the stage 'finetune', there is no optimizer 'adamwx': did you mean 'adamw'?",
            CONFIG,
        ),
        (
            ["--set", "distill.optim.opt_args={beta: 1}"],
            "in the stage 'distill', the optimizer adamw cannot be made with",
            CONFIG,
        ),
        (
            ["--set", "finetune.train.batch_size=64"],
            (
                "in the stage 'finetune', images/train has 48 images, fewer than one batch of 64:"
                " lower --set finetune.train.batch_size=VALUE, and --set finetune.optim.lr=VALUE in"
                " proportion"
            ),
            DATA,
        ),
        (
            ["--set", "finetune.train.accumulate=3"],
            "in the stage 'finetune', batch_size 16 does not divide by 1 processes x 3",
            CONFIG,
        ),
        (
            ["--set", "distill.train.accumulate=16", "distill.data.augment.mixup=0.5"],
            "in the stage 'distill', mixup and cutmix",
            CONFIG,
        ),
        (
            ["--set", "finetune.data.dir=single"],
            "in the stage 'finetune', the images in single are all of one class ('ant')",
            CONFIG,
        ),
        (
            BY_NOBODY,
            "in the stage 'finetune', the teacher vit_tiny_patch16_224 would have random weights",
            CONFIG,
        ),
        (
            [*BY_NOBODY, "finetune.teachers.teacher.checkpoint=typo.pth"],
            "in the stage 'finetune', There is no weights file typo.pth",
            DATA,
        ),
    ],
)
def test_a_mistake_in_a_later_stage_is_found_before_the_first(
    words: list[str], sentence: str, code: int, here: Path, refused: Refused
) -> None:
    (here / "flat").mkdir()
    for split in ("train", "val"):
        shutil.copytree(here / "images" / split / "ant", here / "flat", dirs_exist_ok=True)
        shutil.copytree(here / "images" / split / "ant", here / "single" / split / "ant")
    assert sentence in refused("train", "three.yaml", "--output", "x", *words, code=code)


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
    here: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree("runs")
    before = tree(here)
    assert main(["explain", "three.yaml"]) == 0
    printed = capsys.readouterr().out
    headings = [
        "Stage 1 of 3: pretrain\n===",
        "Stage 2 of 3: finetune, student from pretrain\n",
        "Stage 3 of 3: distill, teacher from finetune\n",
    ]
    places = [printed.index(heading) for heading in headings]
    assert places == sorted(places) and "36 of 36 patches" in printed[places[1] : places[2]]
    rows = {
        line.split()[0]: line.split()[-2:]
        for line in printed[printed.index("  all stages") :].splitlines()[2:]
    }
    counts = {
        name: float(number.replace(",", ""))
        for name, (number, unit) in rows.items()
        if unit == "MFLOPs"
    }
    assert [*counts] == ["pretrain", "finetune", "distill", "together"]
    assert sum(counts[name] for name in three().stages) == pytest.approx(
        counts["together"], rel=0.01
    )
    assert counts["finetune"] / counts["pretrain"] == pytest.approx(37 / 17, rel=0.1)
    assert "in the stage 'distill', " in refused(
        "explain", "three.yaml", "--set", "distill.student.model_args.dept=3", code=CONFIG
    )
    assert main(["explain", "three.yaml", "--recipe-yaml"]) == 0
    assert capsys.readouterr().out == dump(three())
    assert tree(here) == before


def test_stages_are_measured_and_images_counted_where_none_are_named(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitdistill.explain.measure.SECONDS", 0.1)
    assert (
        main(
            ["explain", "three.yaml", "--set", "pretrain.data.dir=''", "--time", "--device", "cpu"]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert (
        printed.startswith("no --data-dir is given: counting ImageNet")
        and printed.count("1,281,167 images x 2 epochs") == 1
    )
    assert printed.count("Measured on this CPU") == 3


# --- flags ---------------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The staged recipe alone, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "three.yaml").write_text(dump(three()))
    return tmp_path


def composed(*words: str) -> dict[str, dict[str, Any]]:
    """The fields of every stage after the flags."""
    _, stages = parse("explain", ExplainFlags, ["three.yaml", *words], "")
    assert isinstance(stages, Stages)
    return {key: flatten(recipe) for key, recipe in stages.stages.items()}


def sentence_of(*words: str, code: int) -> str:
    with pytest.raises(UserError) as caught:
        composed(*words)
    assert caught.value.exit_code == code and "\n" not in str(caught.value)
    return str(caught.value)


VALUES = {
    "data_dir": "elsewhere",
    "model": "vit_tiny_patch16_224.augreg_in21k",
    "model_path": "a.pth",
    "teacher_model": "stage:finetune",
    "amp_dtype": "bfloat16",
    "teacher_precision": "bfloat16",
    "workers": "7",
    "seed": "7",
    "save_every": "7",
    "log_every": "7",
    "img_size": "64",
    "teacher_img_size": "64",
}


def test_a_flag_is_for_the_stages_the_table_says(bare: Path) -> None:
    plain = composed()
    for flag in flags_of(ExplainFlags):
        path = flag.field.metadata.get("path")
        if path is None:
            continue
        scope, choices = STAGED.get(flag.field.name), get_args(flag.value.kind)
        word = VALUES.get(
            flag.field.name, choices[-1] if choices else "true" if flag.value.kind is bool else "1"
        )
        having = [key for key in plain if path in plain[key]]
        if path in ("teachers.teacher.checkpoint", "teachers.teacher.pretrained"):
            assert "would take the place of the weights of 'stage:finetune'" in sentence_of(
                flag.name, word, code=CONFIG
            )
        elif not having:
            assert f"{flag.name} cannot take effect: no stage has " in sentence_of(
                flag.name, word, code=USAGE
            )
        elif scope is None:
            expected = " or ".join(f"{key}.{path}={word}" for key in having)
            assert (
                sentence_of(flag.name, word, code=USAGE)
                == f"{flag.name} is a setting of one stage: --set {expected}"
            )
        else:
            changed = composed(flag.name, word)
            path = "student.model_args.img_size" if path == "student.image_size" else path
            for key in plain:
                differing = {
                    p
                    for p in plain[key].keys() | changed[key].keys()
                    if plain[key].get(p) != changed[key].get(p)
                }
                meant = (
                    key in {EVERY: [*plain], FIRST: ["pretrain"], TAUGHT: ["distill"]}[scope]
                    and word != "stage:finetune"
                )
                assert differing == ({path} if meant else set()), flag.name


@pytest.mark.parametrize(
    ("words", "sentence", "code"),
    [
        (
            ["--epochs", "10"],
            "--set pretrain.train.epochs=10 or finetune.train.epochs=10 or distill.train.epochs=10",
            USAGE,
        ),
        (
            ["--kd-weight", "1"],
            "--kd-weight is a setting of one stage: --set distill.objectives.kd.weight=1",
            USAGE,
        ),
        (["--clip-grad", "none"], "--set pretrain.optim.clip_grad=null or", USAGE),
        (["--sched", "none"], "--set pretrain.optim.sched=none or", USAGE),
        (["--distillation-alpha", "0.5"], "give the weights themselves", USAGE),
        (["--keep-rate", "0.5"], "no stage has a patch selector (--with STAGE.maskedkd)", USAGE),
        (
            ["--without", "distill.kd", "distill.teacher", "--teacher-model", "x"],
            "no stage has a teacher",
            USAGE,
        ),
        (
            ["--with", "finetune.kd", "--teacher-precision", "float32"],
            "--set finetune.teachers.teacher.precision=float32 or distill.",
            USAGE,
        ),
        (
            ["--with", "kd"],
            "--with kd: say which stage it is for (--with pretrain.kd or --with finetune.kd or",
            USAGE,
        ),
        (["--with", "finetun.kd"], "there is no stage 'finetun': did you mean 'finetune'?", USAGE),
        (
            ["--with", "distill.kd"],
            (
                "in the stage 'distill', --with distill.kd: the recipe has an objective of that"
                " name already"
            ),
            USAGE,
        ),
        (
            ["--without", "finetune.kd"],
            "in the stage 'finetune', --without finetune.kd: the recipe has no such part, only ce",
            USAGE,
        ),
        (
            ["--with", "finetune.random_masking:teacher"],
            "hides the same patches from the student and all teachers",
            USAGE,
        ),
        (
            ["--set", "optim.lr=1"],
            "--set optim.lr=1: say which stage it is for (--set pretrain.optim.lr=1 or",
            USAGE,
        ),
        (["--set", "finetune"], "say which stage it is for", USAGE),
        (["--set", "finetune.optim"], "in the stage 'finetune', --set 'optim' has no '='", USAGE),
        (
            ["--set", "finetune.optim.lrr=1"],
            "in the stage 'finetune', the recipe has no field 'optim.lrr' (did you mean 'lr'?)",
            CONFIG,
        ),
        (
            ["--seed", "1", "--set", "finetune.train.seed=2"],
            "in the stage 'finetune', train.seed is set twice",
            USAGE,
        ),
        (
            ["--teacher-model", "vit_tiny_patch16_224"],
            "no later stage uses what the stage 'finetune' trains",
            CONFIG,
        ),
        (
            ["--set", "finetune.train.epochs=0"],
            "in the stage 'finetune', train.epochs is 0",
            CONFIG,
        ),
    ],
)
def test_a_flag_that_is_not_plain_is_refused(
    words: list[str], sentence: str, code: int, bare: Path
) -> None:
    assert sentence in sentence_of(*words, code=code)


def test_methods_come_and_go_by_stage(bare: Path) -> None:
    found = composed(
        "--with",
        "distill.maskedkd",
        "finetune.kd",
        "--without",
        "distill.ce",
        "--keep-rate",
        "0.25",
    )
    assert (
        found["distill"]["selector.keep_rate"] == 0.25
        and "objectives.ce.weight" not in found["distill"]
    )
    assert (
        found["finetune"]["objectives.kd.method"] == "kd"
        and "teachers.teacher.model" in found["finetune"]
    )
    assert found["pretrain"] == flatten(three().stages["pretrain"])
    masked = composed("--with", "pretrain.random_masking")
    assert (
        masked["pretrain"]["masking.method"] == "random_masking"
        and masked["finetune"]["masking"] is None
    )
    _, stages = parse(
        "explain", ExplainFlags, ["three.yaml", "--with", "pretrain.random_masking"], ""
    )
    Path("three.yaml").write_text(dump(stages))
    assert composed("--without", "pretrain.masking")["pretrain"]["masking"] is None


def test_parts_of_a_recipe_are_judged_when_all_is_said(bare: Path) -> None:
    """Without its teacher, nothing uses the second stage; with it as the student, something does
    again.
    """
    words = ["--without", "distill.kd", "distill.teacher"]
    assert "no later stage uses" in sentence_of(*words, code=CONFIG)
    assert (
        composed(*words, "--set", "distill.student.model=stage:finetune")["distill"][
            "student.model"
        ]
        == "stage:finetune"
    )


def test_the_help_of_a_staged_recipe(
    bare: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["train", "three.yaml", "--help"]) == 0
    printed, errors = capsys.readouterr()
    words = " ".join(printed.split())
    assert (
        "The recipe 'three.yaml' has the stages pretrain, finetune, distill." in words
        and errors == ""
    )
    assert "the first stage by --model, --model-path, --pretrained, --img-size;" in words
    assert "(default: 16)" in printed and max(map(len, printed.splitlines())) <= 80


def test_a_recipe_of_one_run_names_no_stage(bare: Path) -> None:
    Path("one.yaml").write_text(dump_recipe(three().stages["finetune"]))
    with pytest.raises(
        ConfigError, match=r"student\.model is 'stage:pretrain', but this recipe has no stages"
    ):
        parse("explain", ExplainFlags, ["one.yaml"], "")
