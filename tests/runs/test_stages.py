"""Stages: one recipe of several runs, each of which is resumed, reused, and never repeated because
of a later one.
"""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from small_runs import interrupted, ranks, records, result, three_stages, tree, write_images

from vitdistill.cli import main
from vitdistill.data.sources.open import open_source
from vitdistill.errors import ConfigError, DataError, Preempted, Set, UserError
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import SoftKD
from vitdistill.recipes.convert import replace_fields
from vitdistill.recipes.settings import StudentConfig, TeacherConfig
from vitdistill.recipes.stages import STAGES, Stages, load
from vitdistill.recipes.yaml import dump_recipe, load_recipe
from vitdistill.runs.identity import read_identity, resolve_run
from vitdistill.runs.label import LabelOptions, label
from vitdistill.runs.networks import build_student, build_teacher_model
from vitdistill.runs.stages import networks_ahead, resolved, train_stages
from vitdistill.storage import checkpoint
from vitdistill.weights.create import create_model

pytestmark = pytest.mark.whole

KEYS = ("pretrain", "finetune", "distill")
DONE = Path("runs/o")


def run(output, stages=None, **options):
    return train_stages(stages or three_stages(), output, device="cpu", **options)


def command(*words):
    assert main([*words, "--device", "cpu"]) == 0


def written(root):
    """Every file with its content and the time it was written."""
    times = {name: (root / name).stat().st_mtime_ns for name in tree(root)}
    return tree(root), times


def stages_written(output=DONE):
    return {key: written(output / key) for key in KEYS}


def digest(model):
    return {key: value.detach().numpy().tobytes() for key, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with images, the staged recipe, and its finished run ``runs/o``; what each stage
    began with is in ``began``.
    """
    root = tmp_path_factory.mktemp("home")
    write_images(root / "images", val=4)
    (root / "three.yaml").write_text(dump_recipe(three_stages()))
    before, began = Path.cwd(), {}

    def look(job):
        taught = {name: digest(teacher.model) for name, teacher in job.teachers.items()}
        began[job.recipe.name] = digest(job.student), taught

    os.chdir(root)
    try:
        assert tuple(run(DONE, prepared=look)) == tuple(began) == KEYS
        torch.save(began, root / "began.pt")
    finally:
        os.chdir(before)
    return root


@pytest.fixture
def here(home, tmp_path, monkeypatch):
    """A copy of ``home`` as the current folder."""
    shutil.copytree(home, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


# --- a run in stages -----------------------------------------------------------------------------


def test_each_stage_begins_with_what_an_earlier_one_gave(here):
    began = torch.load("began.pt", weights_only=True)
    best = create_model(str(DONE / "pretrain" / "best"), image_size=24)
    assert began["finetune"][0] == digest(best)  # its positions at the size of the next stage
    assert began["distill"][1]["teacher"] == digest(create_model(str(DONE / "finetune" / "best")))
    assert began["pretrain"][0] == began["distill"][0]
    for key in KEYS:
        ended = safetensors.torch.load_file(DONE / key / "last" / "model.safetensors")
        assert {name: value.numpy().tobytes() for name, value in ended.items()} != began[key][0]


def test_the_recipe_of_a_stage_runs_alone(here):
    recipe = load_recipe(DONE / "finetune" / "recipe.yaml")
    assert recipe.student.model == "runs/o/pretrain" and recipe.name == "finetune"
    command("train", "runs/o/finetune/recipe.yaml", "--output", "alone")
    assert result(Path("alone")) == result(DONE / "finetune")


@pytest.mark.parametrize("words", [["three.yaml", "--output", "runs/o"], ["runs/o"]])
def test_a_finished_run_is_left_as_it_is(here, capsys, words):
    before = written(here)
    command("train", *words)
    printed = capsys.readouterr().out
    assert printed.count("is finished already: nothing to do") == 3
    assert printed.count("done: top-1") == 3 and written(here) == before
    assert load(DONE / STAGES) == replace(three_stages(), name="o")


def test_a_stopped_run_goes_on_in_the_stage_it_was_stopped_in(here):
    """Stopped in the second stage, as if killed before its last checkpoint, stopped in the third;
    bit by bit the run that never was.
    """
    p = Path("runs/p")
    shutil.copytree(DONE / "pretrain", p / "pretrain")
    kept = {"pretrain": written(p / "pretrain")}
    with pytest.raises(Preempted, match=r"the stage 'finetune', .* SIGINT at step 4 of 6") as found:
        run(p, prepared=interrupted("finetune", 4))
    assert found.value.exit_code == 75 and not (p / "distill").exists()
    shutil.rmtree(checkpoint.folder_of(p / "finetune", 4))
    with pytest.raises(Preempted, match=r"the stage 'distill', .* SIGINT at step 2 of 6"):
        run(p, prepared=interrupted("distill", 2))
    kept["finetune"] = written(p / "finetune")
    command("train", "runs/p")
    assert {key: written(p / key) for key in kept} == kept
    assert [result(p / key) for key in KEYS] == [result(DONE / key) for key in KEYS]


def test_a_stage_with_stored_labels_goes_on(here):
    """Its recipe.yaml has the labels' views and seed, which the staged recipe leaves open."""
    plain = replace(three_stages().stages["pretrain"], name="run")
    objectives = {"ce": CrossEntropy(weight=0.5), "kd": SoftKD(weight=0.5)}
    taught = {"teacher": TeacherConfig(labels="labels/teacher")}
    distill = replace(plain, teachers=taught, objectives=objectives)
    tune = replace(plain, student=StudentConfig(model="stage:distill"))
    stages = Stages(name="stored", stages={"distill": distill, "finetune": tune})
    Path("stored.yaml").write_text(dump_recipe(stages))
    answers = {"labels": None, "model": "runs/o/finetune"}
    live = {f"teachers.teacher.{key}": value for key, value in answers.items()}
    live |= {"data.views": 1, "train.seed": 5}
    label(replace_fields(distill, live), "labels", LabelOptions(part_size=16), device="cpu")
    run("runs/whole", stages)
    data = load_recipe("runs/whole/distill/recipe.yaml").data
    assert (data.views, data.seed) == (1, 5)
    with pytest.raises(Preempted, match=r"the stage 'distill', stopped by SIGINT at step 4 of 6"):
        run("runs/p", stages, prepared=interrupted("distill", 4))
    command("train", "runs/p")
    before = written(here)
    command("train", "stored.yaml", "--output", "runs/p")
    assert written(here) == before
    for key in stages.stages:
        assert result(Path("runs/p") / key) == result(Path("runs/whole") / key)


def test_stages_go_on_from_elsewhere_and_after_a_move(here, tmp_path, monkeypatch):
    """Stopped in the last stage; where its recipe.yaml would lead from there is a run of other
    weights.
    """
    shutil.copytree(DONE / "pretrain", "runs/p/pretrain")
    with pytest.raises(Preempted):
        run("runs/p", prepared=interrupted("distill", 2))
    moved = tmp_path / "moved" / "p"
    shutil.move("runs/p", moved)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.copytree(here / DONE / "pretrain", "runs/p/finetune")
    taught = {}

    def look(job):
        taught[job.recipe.name] = digest(job.teachers["teacher"].model)

    run(moved, everywhere({"data.dir": str(here / "images")}), prepared=look)
    expected = torch.load(here / "began.pt", weights_only=True)
    assert taught == {"distill": expected["distill"][1]["teacher"]}
    assert [result(moved / key) for key in KEYS] == [result(here / DONE / key) for key in KEYS]
    before = written(moved)
    command("train", str(moved), "--data-dir", str(here / "images"))
    assert written(moved) == before


def test_one_stage_at_a_time(here):
    run("runs/p", until="pretrain")
    assert {path.name for path in Path("runs/p").iterdir()} == {"pretrain", STAGES}
    assert result(Path("runs/p/pretrain")) == result(DONE / "pretrain")
    before = written(here)
    with pytest.raises(ConfigError, match="runs/p/distill"):
        resolve_run("runs/p")
    run("runs/p", until="pretrain")
    with pytest.raises(ConfigError, match="'finetune'") as caught:
        run("runs/p", until="finetun")
    assert caught.value.field == "stage" and written(here) == before


def test_a_folder_of_stages_stands_for_its_last(here, capsys):
    assert resolve_run("runs/o") == "runs/o/distill/best"
    assert resolve_run("runs/o/pretrain") == "runs/o/pretrain/best"
    command("eval", "runs/o", "--data-dir", "images", "--workers", "0", "--json")
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    summary = json.loads((DONE / "distill" / "summary.json").read_bytes())
    assert scores["top1"] == summary["best_top1"]
    assert main(["export", "runs/o", "--output", "student"]) == 0
    exported, best = create_model("./student"), create_model("runs/o/distill/best")
    assert digest(exported) == digest(best)


def test_two_processes_go_through_the_stages_together(here):
    calm = changed("finetune", {"student.drop_path": 0.0})
    for summaries in ranks(2, lambda rank: run("runs/two", calm)):
        assert [(one["steps"], one["processes"]) for one in summaries.values()] == [(6, 2)] * 3
    one, two = (
        [line["loss"] for line in records(Path(f"runs/{name}/pretrain"), "train")]
        for name in ("o", "two")
    )
    assert max(one) > 1 and one == pytest.approx(two, rel=1e-4)


# --- what has changed ----------------------------------------------------------------------------


def changed(key, fields, stages=None):
    stages = stages or three_stages()
    recipe = replace_fields(stages.stages[key], fields)
    return replace(stages, stages={**stages.stages, key: recipe})


def everywhere(fields):
    stages = three_stages()
    for key in KEYS:
        stages = changed(key, fields, stages)
    return stages


def refuses(stages, stage, words, output=DONE, **options):
    """Running the stages has to fail over ``stage`` and to change nothing."""
    before = written(Path())
    with pytest.raises(ConfigError, match=words) as caught:
        run(output, stages, **options)
    assert caught.value.stage == stage and Set("name") in caught.value.fixes
    assert written(Path()) == before


def test_a_changed_stage_does_not_repeat_the_one_before(here):
    other = changed("finetune", {"optim.lr": 0.01})
    refuses(other, "finetune", r"optim\.lr is 0\.01 here and 0\.002 there")
    before = stages_written()
    renamed = changed("finetune", {"name": "finetune_b"}, other)
    refuses(renamed, "distill", r"teachers\.teacher\.model is 'runs/o/finetune_b' here")
    both = changed("distill", {"name": "distill_b"}, renamed)
    run(DONE, both, until="pretrain")  # nothing runs: the folder is of its old recipe
    assert resolve_run("runs/o") == "runs/o/distill/best"
    run(DONE, both, until="finetune")
    with pytest.raises(ConfigError, match="runs/o/distill_b"):
        resolve_run("runs/o")
    run(DONE, both)
    assert stages_written() == before and resolve_run("runs/o") == "runs/o/distill_b/best"
    assert load_recipe(DONE / "finetune_b" / "recipe.yaml").student.model == "runs/o/pretrain"
    run(DONE)  # the first one is still there
    assert stages_written() == before and resolve_run("runs/o") == "runs/o/distill/best"


def test_what_cannot_change_a_result_is_no_change(here):
    before = stages_written()
    run(DONE, everywhere({"data.workers": 1, "train.log_every": 7}))
    shutil.move("images", "moved")
    run(DONE, everywhere({"data.dir": "moved"}))
    run(DONE)  # images are not needed once all is finished
    assert stages_written() == before


def test_a_first_stage_trained_anew_is_noticed(here):
    """A stopped stage that began from the old weights does not go on, a finished one is none."""
    shutil.rmtree(DONE / "pretrain")
    other = changed("pretrain", {"train.seed": 3})
    with pytest.raises(ConfigError, match=r"student\.model has other weights") as caught:
        run(DONE, other)
    assert caught.value.stage == "finetune"
    (DONE / "finetune" / "summary.json").unlink()
    refuses(other, "finetune", r"student\.model has other weights")
    shutil.rmtree(DONE / "pretrain")
    before = result(DONE / "distill")
    run(DONE)  # the same weights again, bit by bit
    assert result(DONE / "distill") == before


def test_stages_go_on_with_other_images_once_that_is_accepted(here):
    """Stopped in the second stage; the first had read all images as they were."""
    with pytest.raises(Preempted):
        run("runs/r", prepared=interrupted("finetune", 3))
    Image.new("RGB", (16, 16), (90, 20, 30)).save("images/train/bee/03.png")
    with pytest.raises(DataError, match="training images of this run have changed"):
        run("runs/r")
    assert run("runs/r", everywhere({"train.accept_changed_images": True}))["distill"]["steps"] == 6
    now = open_source("images", "train").fingerprint()
    assert read_identity(Path("runs/r/finetune"))["training images"] == now


# --- before anything runs ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prepare", "stage"),
    [
        (lambda: Path("x").mkdir() or Path("x/notes.txt").touch(), ""),
        (lambda: shutil.copytree("runs/o/pretrain", "x"), ""),
        (lambda: Path("x").touch(), "pretrain"),
        (lambda: Path("x/finetune/sub").mkdir(parents=True), "finetune"),
    ],
)
def test_a_folder_of_something_else_is_left_alone(prepare, stage, here):
    prepare()
    before = written(here)
    with pytest.raises(ConfigError) as caught:
        run("x")
    assert (caught.value.stage, caught.value.field) == (stage, "output")
    assert written(here) == before


VIT_TEACHER = {"model": "vit_tiny_patch16_224"}
TAUGHT = {"objectives": {"kd": {"method": "kd"}}, "teachers": {"teacher": VIT_TEACHER}}
TYPO = {"teachers": {"teacher": {**VIT_TEACHER, "checkpoint": "typo.pth"}}}


@pytest.mark.parametrize(
    ("stage", "fields", "words"),
    [
        ("finetune", {"selector": {"method": "maskedkd"}}, "teacher"),
        ("distill", {"data.dir": "nowhere"}, "nowhere"),
        ("finetune", {"data.dir": ""}, "images"),
        ("finetune", {"student.model_args.dept": 3}, "dept"),
        ("distill", {"student.model": "vit_tinny"}, "vit_tinny"),
        ("finetune", {"optim.opt": "adamwx"}, "'adamw'"),
        ("finetune", {"train.batch_size": 64}, "48 images"),
        ("distill", {"train.accumulate": 16, "data.augment.mixup": 0.5}, "mixup"),
        ("finetune", TAUGHT, "random weights"),
        ("finetune", TAUGHT | TYPO, "typo.pth"),
    ],
)
def test_a_mistake_in_a_later_stage_is_found_before_the_first(stage, fields, words, here):
    before = written(here)
    with pytest.raises(UserError, match=words) as caught:
        run("x", changed(stage, fields))
    assert caught.value.stage == stage
    assert written(here) == before


def test_a_network_is_foreseen_as_it_will_be(here):
    """Architecture, sizes, classes and parameters of student and teacher, against those built from
    the folders.
    """
    before = {}

    def same(foreseen, real):
        assert replace(foreseen.network, architecture="") == replace(real.network, architecture="")
        assert foreseen.spec.image_size == real.spec.image_size
        shapes = [{k: v.shape for k, v in it.model.state_dict().items()} for it in (foreseen, real)]
        assert shapes[0] == shapes[1]

    for key in KEYS:
        _, student, teachers = networks_ahead(three_stages(), key, 3, before)
        recipe = resolved(three_stages(), key, DONE)
        same(student, build_student(recipe.student, 3))
        for name, built in teachers.items():
            same(built, build_teacher_model(recipe.teachers[name], name))


def test_explaining_stages_that_have_not_run(here, capsys):
    shutil.rmtree("runs")
    before = written(here)
    assert main(["explain", "three.yaml"]) == 0
    printed = capsys.readouterr().out
    headings = ("Stage 1 of 3: pretrain", "finetune, student from", "teacher from finetune")
    places = [printed.index(heading) for heading in headings]
    assert places == sorted(places) and "36 of 36 patches" in printed[places[1] : places[2]]
    rows = [line.split() for line in printed[printed.index("  all stages") :].splitlines()[2:]]
    counts = {row[0]: float(row[-2].replace(",", "")) for row in rows if row[-1:] == ["MFLOPs"]}
    assert tuple(counts) == (*KEYS, "together")
    assert sum(counts[key] for key in KEYS) == pytest.approx(counts["together"], rel=0.01)
    assert counts["finetune"] / counts["pretrain"] == pytest.approx(37 / 17, rel=0.1)
    assert main(["explain", "three.yaml", "--recipe-yaml"]) == 0
    assert capsys.readouterr().out == dump_recipe(three_stages()) and written(here) == before
