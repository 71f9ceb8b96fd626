"""Which runs a study comes to."""

import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vitdistill.explain.ahead
from vitdistill.errors import ConfigError
from vitdistill.explain.ahead import forecast
from vitdistill.methods.base import TeacherObjective
from vitdistill.recipes import RECIPES
from vitdistill.recipes.config import Recipe
from vitdistill.recipes.convert import to_dict
from vitdistill.recipes.named import named_recipe
from vitdistill.recipes.settings import LabelOptions
from vitdistill.recipes.stages import Stages, sources
from vitdistill.recipes.yaml import dump_yaml
from vitdistill.study.plan import (
    Row,
    Study,
    jobs_of,
    load_study,
    resolve,
    together,
    without_teachers,
)
from vitdistill.study.run import Work, check, describe

PLAIN = [name for name in RECIPES if not isinstance(named_recipe(name), Stages)]


def study(**changes: Any) -> Study:
    rows = {"kd": Row(recipe="kd"), "masked": Row(recipe="maskedkd")}
    shared = {"teacher": Row(recipe="alone", set={"student.model_args.depth": 6})}
    return replace(Study(rows=rows, shared=shared, seeds=(3, 5)), **changes)


def test_rows_by_seeds_after_what_they_share_and_beside_the_student_alone() -> None:
    jobs = jobs_of(study())
    rows = ["alone", "kd", "masked"]
    assert [job.folder for job in jobs] == [
        "teacher",
        *(f"{r}/seed-{s}" for s in (3, 5) for r in rows),
    ]
    for job in jobs[1:]:
        assert job.recipe.train.seed == int(job.folder.rpartition("-")[2])
        assert job.recipe.name == job.row == job.folder.partition("/")[0]
        taught = {"teachers.teacher.model": "teacher"} if job.row != "alone" else {}
        assert sources(job.recipe) == taught
        assert isinstance(together(jobs, job), Stages) == bool(taught)
    done = resolve(jobs, jobs[2], Path("out"))
    assert isinstance(done, Recipe) and done.teachers["teacher"].model == "out/teacher"


def test_labels_are_written_once_and_read_by_every_seed_in_their_views() -> None:
    labels = Row(label="kd", set={"data.seed": 7})
    shared = {**study().shared, "answers": labels}
    stored = Row(recipe="kd", set={"teachers.teacher.labels": "stage:answers"})
    jobs = jobs_of(study(shared=shared, rows={"stored": stored, "live": Row(recipe="maskedkd")}))
    assert [job.folder for job in jobs[:3]] == ["teacher", "answers", "alone/seed-3"]
    assert jobs[1].label is not None and jobs[1].needs == {"teacher"}
    for job in jobs[2:]:
        assert job.recipe.data_seed == 7, "so that seeds pair"
        needed = {"alone": set(), "stored": {"answers"}, "live": {"teacher"}}
        assert job.needs == needed[job.row]
    reading = next(job for job in jobs if job.row == "stored")
    done = resolve(jobs, reading, Path("out"))
    assert isinstance(done, Recipe)
    assert done.teachers["teacher"].labels == "out/answers/teacher"
    assert not done.teachers["teacher"].model
    ahead = together(jobs, reading)
    assert isinstance(ahead, Stages) and [*ahead.stages] == ["teacher", "stored"]
    assert ahead.stages["stored"].teachers["teacher"].model == "stage:teacher"


def test_what_is_shared_is_done_just_before_the_first_row_that_needs_it(tmp_path: Path) -> None:
    shared = {**study().shared, "unused": Row(recipe="alone"), "answers": Row(label="kd")}
    rows = {
        "live": Row(recipe="maskedkd"),
        "stored": Row(recipe="kd", set={"teachers.teacher.labels": "stage:answers"}),
    }
    work = Work(study(shared=shared, rows=rows, seeds=(0, 1)), tmp_path)
    first = ["alone/seed-0", "teacher", "live/seed-0", "answers", "stored/seed-0"]
    second = ["alone/seed-1", "live/seed-1", "stored/seed-1"]
    assert [job.folder for job in work.pending()] == first + second


SHALLOW = {"student.model_args.depth": 3}
SPARSE = {"encoding": "topk", "k": 5}
READS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "all of it": (SPARSE, "kd", {}),
    "complete logits at any temperature": ({"encoding": "float16"}, "kd", {"temperature": 3}),
    "another temperature": (SPARSE, "kd", {"temperature": 3}),
    "complete logits": (SPARSE, "standardized_kd", {}),
    "hidden states": ({}, "vitkd", {}),
    "chosen patches": ({}, "maskedkd", {}),
}


@pytest.mark.parametrize("what", READS)
def test_a_row_reads_what_its_shared_labels_will_hold(what: str, tmp_path: Path) -> None:
    options, recipe, changed = READS[what]
    settings = {f"objectives.kd.{key}": value for key, value in changed.items()}
    reads = {"teachers.teacher.labels": "stage:answers", **settings}
    rows = {"mine": Row(recipe=f"small_images_{recipe}", set=reads)}
    answers = Row(label="small_images_kd", options=LabelOptions(**options))
    shared = {"teacher": Row(recipe="small_images_alone"), "answers": answers}
    refused = list(READS).index(what) > 1
    with pytest.raises(ConfigError, match="in the row 'mine'") if refused else nullcontext():
        check(Work(study(shared=shared, rows=rows, set=SHALLOW), tmp_path))


def test_shared_labels_that_cannot_be_stored_are_refused(tmp_path: Path) -> None:
    shared = {"teacher": Row(recipe="small_images_alone")}
    shared["answers"] = Row(label="small_images_kd", options=LabelOptions(hidden_dtype="float32"))
    with pytest.raises(ConfigError, match="in the row 'answers'") as refused:
        check(Work(study(shared=shared, rows={"kd": Row(recipe="small_images_kd")}), tmp_path))
    assert refused.value.field == "hidden_dtype"


def test_what_is_shared_is_forecast_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []

    def count(plan: Any, student: Any, *others: Any) -> Any:
        counted.append(plan.student.architecture)
        return real(plan, student, *others)

    real = vitdistill.explain.ahead.cost_of
    monkeypatch.setattr(vitdistill.explain.ahead, "cost_of", count)
    rows = {name: Row(recipe=f"small_images_{name}") for name in ("kd", "maskedkd")}
    answers = Row(label="small_images_kd")
    shared = {"teacher": Row(recipe="small_images_alone"), "answers": answers}
    work = Work(study(shared=shared, rows=rows, set=SHALLOW), tmp_path)
    assert [*work.ahead] == ["teacher", "answers", "alone", *rows]
    assert len(counted) == len(work.ahead)
    monkeypatch.undo()
    for job in work.jobs:
        alone = [*forecast(together(work.jobs, job)).values()][-1]
        assert work.ahead[job.row][-1][0].flops == alone.flops


def test_a_row_whose_teacher_is_another_row_without_a_classifier_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitdistill.explain.measure.SECONDS", 0.0)
    shared, rows = (
        {"teacher": Row(recipe="small_images_mae")},
        {"dmae": Row(recipe="small_images_dmae")},
    )
    work = Work(study(shared=shared, rows=rows, set=SHALLOW, alone=False), tmp_path)
    header, *lines = describe(work, "cpu")
    assert "time" in header and [line.split()[0] for line in lines[1:3]] == ["teacher", "dmae"]


def test_no_row_takes_the_place_of_another() -> None:
    kd, wider = Row(recipe="kd"), Row(recipe="kd", set={"student.drop_path": 0.2})
    for rows in ({"kd": kd, "wider": wider, "alone_2": kd}, {"kd": kd, "alone": kd}):
        with pytest.raises(ConfigError):
            jobs_of(study(rows=rows))
    with pytest.raises(ConfigError) as refused:
        jobs_of(study(rows={"kd": kd}, grid={"data.dir": ("my photos", "my/photos")}))
    assert refused.value.field == "grid"
    shared = {"kd_temperature_2": Row(recipe="alone")}
    row = Row(recipe="kd", set={"teachers.teacher.model": "stage:kd_temperature_2"})
    grid = {"objectives.kd.temperature": (2.0,)}
    jobs = jobs_of(study(rows={"kd": row}, shared=shared, grid=grid, alone=False))
    ahead = together(jobs, jobs[-1])
    assert isinstance(ahead, Stages) and len(ahead.stages) == 2


def test_a_warm_up_fits_fewer_epochs_as_it_does_on_the_command_line() -> None:
    short, given = {"train.epochs": 2}, {"train.epochs": 2, "optim.warmup_epochs": 1}
    rows = {"short": Row(recipe="kd", set=short), "given": Row(recipe="kd", set=given)}
    found = {job.row: job.recipe for job in jobs_of(study(rows=rows, alone=False, seeds=(0,)))}
    assert found["short"].optim.warmup_epochs == 0.4
    assert found["given"].optim.warmup_epochs == 1


def test_a_row_with_stages_has_a_seed_in_each_and_names_what_is_shared() -> None:
    row = Row(recipe="small_images_dmae", set={"train.epochs": 30, "finetune.optim.lr": 0.5})
    jobs = jobs_of(study(rows={"two": row}, seeds=(3,), alone=True))
    (_, job) = jobs
    assert job.needs == {"teacher"}
    first, last = job.parts.values()
    assert {r.train.seed for r in (first, last)} == {3}
    assert {r.train.epochs for r in (first, last)} == {30}
    assert last.optim.lr == 0.5 != first.optim.lr and first.name != last.name
    ahead = together(jobs, job)
    assert isinstance(ahead, Stages) and [*ahead.stages] == ["teacher", *job.parts]
    done = resolve(jobs, job, Path("out"))
    assert isinstance(done, Stages)
    assert done.stages[next(iter(job.parts))].teachers["teacher"].model == "out/teacher"
    assert sources(done.last) == sources(last), "its own stages are for it to resolve"


@given(st.lists(st.sampled_from([1.0, 2.0, 4.0]), min_size=1, unique=True))
def test_a_grid_makes_a_row_of_every_combination(temperatures: list[float]) -> None:
    grid = {"objectives.kd.temperature": tuple(temperatures), "optim.lr": (1e-3, 1e-4)}
    jobs = jobs_of(study(rows={"kd": Row(recipe="kd")}, grid=grid, seeds=(0,)))
    found = {job.row: job.recipe for job in jobs if job.row.startswith("kd")}
    assert len(found) == 2 * len(temperatures)
    for name, recipe in found.items():
        kd: Any = recipe.objectives["kd"]
        assert name == f"kd-temperature={kd.temperature}-lr={recipe.optim.lr}"
    assert [job.row for job in jobs].count("alone") == 1


@pytest.mark.parametrize("name", PLAIN)
def test_every_recipe_has_a_student_alone(name: str) -> None:
    recipe = named_recipe(name)
    assert not isinstance(recipe, Stages)
    alone = without_teachers(recipe, "alone")
    assert not alone.teachers and alone.selector is None
    assert not any(isinstance(o, TeacherObjective) for o in alone.objectives.values())
    assert (alone.student, alone.optim, alone.train) == (recipe.student, recipe.optim, recipe.train)


def test_the_student_alone_is_there_once_a_student() -> None:
    own = study(rows={"kd": Row(recipe="kd"), "own": Row(recipe="alone")}, seeds=(0,))
    assert [job.row for job in jobs_of(own)] == ["teacher", "kd", "own"]
    larger = Row(recipe="kd", set={"student.model": "deit_small_patch16_224"})
    two = study(rows={"kd": Row(recipe="kd"), "larger": larger}, seeds=(0,))
    assert [job.row for job in jobs_of(two)] == ["teacher", "alone", "alone_2", "kd", "larger"]
    assert len(jobs_of(study(alone=False))) == 1 + 2 * 2


def test_the_study_of_the_guide_is_one(tmp_path: Path) -> None:
    guide = Path(__file__).parents[2] / "docs" / "studies.md"
    text, _ = re.findall(r"```yaml\n(.*?)```", guide.read_text(), re.DOTALL)
    (tmp_path / "study.yaml").write_text(text)
    jobs = jobs_of(load_study(tmp_path / "study.yaml"))
    assert len(jobs) == 1 + 4 * (1 + 2 * 2)
    assert {job.recipe.train.epochs for job in jobs} == {50}


@pytest.mark.parametrize("name", ["few_labels", "few_labels_gpu"])
def test_the_studies_of_the_benchmarks_are_ones(name: str) -> None:
    found = load_study(Path(__file__).parents[2] / "benchmarks" / "studies" / f"{name}.yaml")
    runs = [job for job in jobs_of(found) if "/" in job.folder]
    assert found.name == name and len(runs) == len(found.seeds) * len(found.rows)


def test_a_file_is_read_back_and_unknown_fields_are_refused(tmp_path: Path) -> None:
    file, wanted = tmp_path / "s.yaml", study(grid={"optim.lr": (1e-3, 1e-4)})
    file.write_text(dump_yaml(to_dict(wanted)))
    assert load_study(file) == wanted
    for text in (
        "row: {kd: {recipe: kd}}",
        "rows: {kd: {recipes: kd}}",
        "rows: {}",
        "{rows: {kd: {recipe: kd}}, seeds: []}",
        "{rows: {kd: {recipe: kd}}, seeds: [1, 1]}",
        "{rows: {kd: {recipe: kd}}, grid: {optim.lr: []}}",
        "{rows: {alone: {recipe: kd}}}",
        "{rows: {kd: {recipe: kd}}, shared: {alone: {recipe: alone}}}",
        "{rows: {kd: {recipe: kd}}, shared: {kd: {recipe: alone}}}",
        "rows: {kd: {}}",
        "rows: {kd: {recipe: kd, label: kd}}",
        "rows: {kd: {recipe: kd, options: {k: 5}}}",
        "rows: {kd: {label: kd}}",
    ):
        file.write_text(text)
        with pytest.raises(ConfigError):
            load_study(file)
    for row in (
        Row(recipe="nothing"),
        Row(recipe="kd", set={"optim.rate": 1}),
        Row(recipe="kd", set={"teachers.teacher.model": "stage:other"}),
        Row(recipe="kd", set={"teachers.teacher.labels": "stage:teacher"}),
    ):
        with pytest.raises(ConfigError):
            jobs_of(study(rows={"kd": row}))
    for shared in ({"two": Row(recipe="mae_base")}, {"finetune": Row(recipe="alone")}):
        with pytest.raises(ConfigError, match=r"has stages|names both a stage"):
            jobs_of(study(shared=shared, rows={"other": Row(recipe="mae_base")}))
