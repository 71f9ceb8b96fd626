"""What is compared with what, and what a run and all before it cost."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.report.made import NUM_IMAGES, alone, make_run, make_stages, taught
from vitdistill.errors import ConfigError, DataError
from vitdistill.methods.maskedkd import MaskedKD
from vitdistill.recipes.settings import OptimConfig
from vitdistill.report.answers import read_answers
from vitdistill.report.files import find_runs, read_run
from vitdistill.report.groups import Group, ask_questions, group_runs


def groups_in(folder: Path) -> list[Group]:
    return group_runs([read_run(run) for run in find_runs([folder])])


def asked(folder: Path) -> list[tuple[str, str]]:
    return [(q.ours.name, q.theirs.name) for q in ask_questions(groups_in(folder))]


def test_seeds_of_one_recipe_are_one_row_and_pair(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        make_run(tmp_path / f"a{seed}", alone(f"alone-seed{seed}", seed), 0.5 + seed / 100)
        make_run(tmp_path / f"k{seed}", taught(f"kd_{seed}", seed), 0.6 + seed / 100)
    groups = groups_in(tmp_path)
    assert [(group.name, len(group.runs)) for group in groups] == [("alone", 3), ("kd", 3)]
    (question,) = ask_questions(groups)
    assert question.comparison.paired and question.comparison.num_seeds == 3
    assert question.comparison.difference == pytest.approx(0.1)
    assert question.comparison.seeds_error == pytest.approx(0)


def test_recipes_of_one_name_are_told_apart_by_where_they_lie_below_all_runs(
    tmp_path: Path,
) -> None:
    for place, lr in (("a/kd", 1e-3), ("b/kd", 1e-4), ("b/c/x", 1e-5)):
        name = "other" if place.endswith("x") else "kd"
        make_run(tmp_path / place, taught(name, optim=OptimConfig(lr=lr)), 0.5)
    assert [group.name for group in groups_in(tmp_path)] == ["a/kd", "other", "b/kd"]


def test_a_number_that_every_seed_has_in_its_name_is_no_seed(tmp_path: Path) -> None:
    for rate in (0.5, 0.25):
        for seed in (0, 1):
            recipe = taught(f"kept={rate}", seed, selector=MaskedKD(keep_rate=rate))
            make_run(tmp_path / f"{rate}-{seed}", recipe, 0.5)
    assert [group.name for group in groups_in(tmp_path)] == ["kept=0.25", "kept=0.5"]


def test_a_taught_recipe_is_measured_by_the_best_of_the_same_student_and_the_first_taught(
    tmp_path: Path,
) -> None:
    larger = replace(alone("x").student, model_args={**alone("x").student.model_args, "depth": 2})
    make_run(tmp_path / "1", alone("alone"), 0.5)
    make_run(tmp_path / "2", alone("slow", optim=OptimConfig(lr=1e-5)), 0.4)
    make_run(tmp_path / "3", alone("larger", student=larger), 0.9)
    make_run(tmp_path / "4", taught("kd"), 0.6)
    make_run(tmp_path / "5", taught("masked", selector=MaskedKD()), 0.6)
    make_run(tmp_path / "6", taught("begun", selector=MaskedKD(keep_rate=0.3)))
    assert asked(tmp_path) == [("kd", "alone"), ("masked", "alone"), ("masked", "kd")]
    elsewhere = make_run(tmp_path / "7", taught("other", selector=MaskedKD(keep_rate=0.7)), 0.7)
    (elsewhere / "identity.json").write_text('{"validation images": "others"}')
    assert len(asked(tmp_path)) == 3, "runs judged on other images are not compared"


def test_a_stage_is_called_by_its_recipe_and_measured_with_what_came_before_it(
    tmp_path: Path,
) -> None:
    """Its student is that of the first stage, and it is taught if an earlier stage was."""
    teacher = make_run(tmp_path / "teacher", alone("teacher"), 0.4)
    make_run(tmp_path / "alone", alone("alone", optim=OptimConfig(lr=1e-5)), 0.5)
    make_stages(tmp_path / "untaught")
    make_stages(tmp_path / "dmae", teacher=teacher)
    for seed in (0, 1):
        make_stages(tmp_path / "row" / f"seed-{seed}", "row-", seed, teacher, lr=1e-3)
    names = [g.name for g in groups_in(tmp_path) if "stage" in g.name]
    of = ("dmae", "row", "untaught")
    assert names == [f"{n} (stage {stage})" for n in of for stage in ("pretrain", "finetune")]
    found = {
        q.ours.name: (q.theirs.name, q.best_of)
        for q in ask_questions(groups_in(tmp_path))
        if q.best_of and "finetune" in q.ours.name
    }
    measure = ("untaught (stage finetune)", 4)
    assert found == {"dmae (stage finetune)": measure, "row (stage finetune)": measure}


def test_a_run_pays_for_the_runs_whose_weights_it_needed_once(tmp_path: Path) -> None:
    teacher = make_run(tmp_path / "teacher", alone("teacher"), 0.9)
    first = make_run(tmp_path / "first", taught("first"), 0.8, learnt_from=teacher)
    second = taught("second", selector=MaskedKD(keep_rate=0.5))
    run = make_run(tmp_path / "second", second, 0.8, learnt_from=first)
    both = json.loads((run / "identity.json").read_text())
    weights = json.loads((first / "identity.json").read_text())["teachers.teacher.model"]
    (run / "identity.json").write_text(json.dumps({**both, "weights of more": weights}))
    paid = {group.name: group.paid[0] for group in groups_in(tmp_path)}
    assert paid["teacher"].before == 0 and paid["teacher"].total == paid["teacher"].own
    assert paid["first"].before == paid["teacher"].own
    own = [paid[name].own for name in ("teacher", "first")]
    assert paid["second"].before == sum(value or 0 for value in own)


def test_a_teacher_that_another_one_began_with_is_a_teacher(tmp_path: Path) -> None:
    student = alone("alone").student
    wide = replace(student, model_args={**student.model_args, "embed_dim": 36})
    teacher = make_run(tmp_path / "teacher", alone("teacher", student=wide), 0.5)
    later = make_run(tmp_path / "later", alone("later", student=wide), 0.6, began_from=teacher)
    make_run(tmp_path / "kd", taught("kd"), 0.5, learnt_from=teacher)
    make_run(tmp_path / "kd_later", taught("kd_later"), 0.5, learnt_from=later)
    make_run(tmp_path / "alone", alone("alone"), 0.4)
    serves = {group.name: group.serves for group in groups_in(tmp_path)}
    results = {"kd": "", "kd_later": "", "alone": ""}
    assert serves == {"teacher": "teacher", "later": "teacher", **results}


def test_answers_of_other_weights_or_images_are_not_used(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", taught("kd"), 0.5, right=20)
    answers = read_answers(run)
    assert answers is not None and answers.right.sum() == 20 and len(answers.right) == NUM_IMAGES
    (group,) = groups_in(tmp_path)
    assert group.scores is not None and len(group.scores.right) == 1
    (run / "identity.json").write_text('{"validation images": "others"}')
    (group,) = groups_in(tmp_path)
    assert group.scores is not None and not group.scores.right
    weights = run / "last" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert read_answers(run) is None


def test_runs_are_found_once_wherever_they_lie(tmp_path: Path) -> None:
    make_run(tmp_path / "b" / "c", alone("c"))
    make_run(tmp_path / "a", alone("a"))
    found = find_runs([tmp_path / "b" / "c", tmp_path, tmp_path / "a" / ".." / "a"])
    assert found == [tmp_path / "b" / "c", tmp_path / "a"]
    with pytest.raises(ConfigError, match="there is no run in"):
        find_runs([tmp_path / "b" / "d"])


def test_a_line_that_is_being_written_is_left_out_and_a_damaged_one_is_named(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "run", alone("run"), 0.5)
    log = run / "metrics.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole + b'\n{"kind": "eval", "st')
    assert read_run(run).curve("eval", "top1")[-1] == (10, 0.5)
    log.write_bytes(whole.replace(b"{", b"[", 1))
    with pytest.raises(DataError, match="line 1 of"):
        read_run(run)
