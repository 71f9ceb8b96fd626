"""Recipes: the same in YAML and in Python, and read strictly."""

import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vitdistill.data.augment import Augment
from vitdistill.errors import ConfigError
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import HardKD, SoftKD
from vitdistill.methods.maskedkd import MaskedKD, TeacherGuided
from vitdistill.recipes import RECIPES, find_recipe, named_recipe
from vitdistill.recipes.config import (
    VOLATILE,
    OptimConfig,
    Recipe,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
    convert,
    differences,
    dump_recipe,
    fingerprint,
    flatten,
    from_dict,
    load_recipe,
    parse_value,
    replace_fields,
    to_dict,
)


def read(tmp_path: Path, text: str | bytes) -> Recipe:
    path = tmp_path / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe(path)


def refused(tmp_path: Path, text: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    sentence = str(caught.value)
    assert "mine.yaml" in sentence and "\n" not in sentence and len(sentence) < 500
    return sentence


# --- round trips ---------------------------------------------------------------------------------


SINGLE = [
    name for name in RECIPES if isinstance(named_recipe(name), Recipe)
]  # of those with stages tests/test_stages.py speaks


@pytest.mark.parametrize("name", SINGLE)
def test_a_named_recipe_survives_yaml(name: str, tmp_path: Path) -> None:
    recipe = named_recipe(name)
    assert recipe.name == name and recipe.description
    again = read(tmp_path, dump_recipe(recipe))
    assert (
        again == recipe
        and fingerprint(again) == fingerprint(recipe)
        and differences(again, recipe) == []
    )


@pytest.mark.parametrize("name", SINGLE)
def test_a_dumped_recipe_means_the_same_to_other_yaml_readers(name: str) -> None:
    recipe = named_recipe(name)
    assert yaml.safe_load(dump_recipe(recipe)) == to_dict(recipe)


words = st.one_of(
    st.sampled_from(
        [
            "no",
            "null",
            "~",
            "1e-3",
            "010",
            "1:30",
            "true",
            ".nan",
            "",
            " ",
            "a: b",
            "#c",
            "<<",
            "=",
            "2026-11-21",
            "- x",
            "é",
        ]
    ),
    st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=8),
)
plain = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        words,
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=6,
)
recipes = st.builds(
    Recipe,
    description=words,
    student=st.builds(
        StudentConfig,
        model=words,
        checkpoint=st.none() | words,
        model_args=st.dictionaries(words, plain, max_size=3),
    ),
    teachers=st.dictionaries(
        st.sampled_from(["teacher", "second"]), st.builds(TeacherConfig, model=words), max_size=2
    ),
    objectives=st.dictionaries(
        st.sampled_from(["ce", "kd", "other"]),
        st.one_of(
            st.builds(CrossEntropy, smoothing=st.floats(0, 0.99)),
            st.builds(SoftKD, weight=st.floats(1e-9, 1e9), temperature=st.floats(1e-3, 1e3)),
            st.builds(HardKD, teacher=words),
        ),
        min_size=1,
    ),
    selector=st.none()
    | st.builds(
        MaskedKD,
        keep_rate=st.floats(1e-6, 1),
        num_keep=st.none() | st.integers(1, 9),
        block=st.integers(-3, 3),
    )
    | st.builds(TeacherGuided, softmax_over=st.sampled_from(["tokens", "patches"])),
    optim=st.builds(
        OptimConfig,
        lr=st.floats(1e-12, 1e3),
        min_lr=st.floats(0, 1),
        clip_grad=st.none() | st.floats(1e-3, 1e3),
    ),
    train=st.builds(
        TrainConfig,
        epochs=st.integers(6, 10**6),
        seed=st.integers(-(2**40), 2**40),
        ema_decay=st.none() | st.floats(0.1, 0.9),
    ),
)


@given(recipe=recipes)
def test_any_recipe_survives_yaml_and_json(
    recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe


@settings(max_examples=8)
@given(recipe=recipes)
def test_flattening_keeps_every_leaf(recipe: Recipe) -> None:
    flat = flatten(recipe)
    assert (
        flat["student.model"] == recipe.student.model
        and flat["train.epochs"] == recipe.train.epochs
    )
    assert len(fingerprint(recipe)) == 64 and fingerprint(recipe) == fingerprint(
        from_dict(to_dict(recipe))
    )


# --- YAML's traps --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("optim: {lr: 1e-3}", "optim.lr", 0.001),
        ("optim: {lr: 1E-3}", "optim.lr", 0.001),
        ("optim: {lr: '1e-3'}", "optim.lr", 0.001),
        ("optim: {lr: 1}", "optim.lr", 1.0),
        ("train: {epochs: 10.0}", "train.epochs", 10),
        ("train: {epochs: 010}", "train.epochs", 10),
        ("optim: {opt: no, sched: cosine}", "optim.opt", "no"),
        ("name: 2026-11-21", "name", "2026-11-21"),
        ("name: 1:30", "name", "1:30"),
        ("optim: {opt_args: {eps: 1e-8}}", "optim.opt_args.eps", 1e-8),
        ("optim: {opt_args: {eps: '1e-8'}}", "optim.opt_args.eps", "1e-8"),
        ("selector: {method: maskedkd, keep_rate: 1}", "selector.keep_rate", 1.0),
        ("optim: {sched: none, warmup_epochs: 0}", "optim.sched", "none"),
        ("data: {in_memory: null}", "data.in_memory", None),
        ("data: {augment: {scale: [0.5, 1]}}", "data.augment.scale", [0.5, 1.0]),
    ],
)
def test_words_mean_what_they_look_like(text: str, field: str, value: Any, tmp_path: Path) -> None:
    found = flatten(read(tmp_path, text))[field]
    assert found == value and type(found) is type(value)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    assert read(tmp_path, b"\xef\xbb\xbfname: caf\xc3\xa9\n").name == "café"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("optim: {lr: 0.1}\noptim: {lr: 0.2}", "'optim' is given twice"),
        ("optim: {lr: 0.1, lr: 0.2}", "line 1 .*'lr' is given twice"),
        ("train: &a {epochs: 3}\ndata: *a", "line 2 .*aliases are not allowed"),
        ("name: !!python/object/apply:os.getcwd []", "tag .*python.* is not allowed"),
        ("name: !!timestamp abc", "tag .* is not allowed"),
        ("optim: !!float '1'", "tag .* is not allowed"),
        (b"name: caf\xe9", "not UTF-8"),
        ("name: x".encode("utf-16"), "not UTF-8"),
        ("name: \x00", "not valid YAML"),
        ("name: [", "line 1 is not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("--- 1\n--- 2", "not valid YAML"),
        ("", "not a mapping"),
        ("[1, 2]", "not a mapping"),
        ("5: x", "line 1 .*the key 5 is not text"),
        ("? [a]\n: x", "is not text"),
        ("<<: {name: x}", "unknown field '<<'"),
        ("[" * 20_000, "nested too deeply"),
        ("name: {" + "a: {" * 20_000, "nested too deeply"),
        ("optim: {lr: .nan}", "optim.lr .* a number is needed"),
        ("optim: {lr: .inf}", "optim.lr .* a number is needed"),
        ("optim: {lr: fast}", "optim.lr in .*mine.yaml is 'fast': a number is needed"),
        ("optim: {lr: true}", "optim.lr .* a number is needed"),
        ("optim: {lr: null}", "optim.lr .* a number is needed"),
        ("optim: {lr: 1" + "0" * 400 + "}", "optim.lr .* a number is needed"),
        ("optim: {lr: [1]}", "optim.lr .* a number is needed"),
        ("train: {epochs: 1.5}", "train.epochs .* a whole number is needed"),
        ("train: {epochs: '--5'}", "train.epochs .* a whole number is needed"),
        ("train: {epochs: '²'}", "train.epochs .* a whole number is needed"),
        ("train: {epochs: true}", "train.epochs .* a whole number is needed"),
        ("train: {compile: yes}", "train.compile .* true or false is needed"),
        ("train: {compile: 1}", "train.compile .* true or false is needed"),
        ("name: 5", "name .* text is needed"),
        ("student: tiny", "student .* a mapping is needed"),
        ("student: {model_args: [1]}", "student.model_args .* a mapping is needed"),
        ("student: {model_args: {a: .nan}}", "student.model_args.a .* finite"),
        ("data: {augment: {scale: [1]}}", "data.augment.scale .* a list of 2 numbers"),
        ("data: {augment: {scale: [1, big]}}", r"data.augment.scale\[1\] .* a number"),
        ("optim: {sched: cosin}", "optim.sched .*did you mean 'cosine'"),
        ("teachers: [a]", "teachers .* a mapping is needed"),
        ("objectives: {kd: 3}", "objectives.kd .* key 'method'"),
        ("objectives: {kd: {weight: 1}}", "objectives.kd .* key 'method'"),
        ("objectives: {kd: {method: kdd}}", "no method 'kdd': did you mean 'kd'"),
        ("objectives: {kd: {method: maskedkd}}", "not an objective"),
        ("selector: {method: kd}", "not a patch selector"),
        (
            "objectives: {kd: {method: kd, temprature: 2}}",
            "'objectives.kd.temprature' .*did you mean 'temperature'",
        ),
        ("selector: {method: maskedkd, keep_rate: 0}", "keep_rate is 0"),
        ("selector: {method: maskedkd, keep_rate: half}", "selector.keep_rate .* a number"),
        ("name: ../up", "plain name of a folder"),
        ("name: ''", "plain name of a folder"),
        ("objectives: {loss: {method: ce}}", "logged curves"),
        ("objectives: {a.b: {method: ce}}", "letters"),
        ("teachers: {student: {model: x}}", "another word"),
        ("unknown: " + "x" * 9000, "unknown field 'unknown'"),
        ("student: " + "x" * 9000, "a mapping is needed"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(
    text: str | bytes, sentence: str, tmp_path: Path
) -> None:
    assert re.search(sentence, refused(tmp_path, text))


def test_a_canary_in_a_tag_does_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    refused(
        tmp_path,
        "name: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path"
        f" ['{canary}']]",
    )
    assert not canary.exists()


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("studnet: {}", "student"),
        ("train: {epoch: 3}", "epochs"),
        ("optim: {weight_deacy: 0.1}", "weight_decay"),
        ("data: {augment: {mixupp: 1}}", "mixup"),
        ("teachers: {teacher: {chekpoint: x}}", "checkpoint"),
    ],
)
def test_an_unknown_field_gets_a_suggestion(wrong: str, right: str, tmp_path: Path) -> None:
    assert f"did you mean {right!r}" in refused(tmp_path, wrong)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for name in (str(tmp_path / "no.yaml"), "no.yaml", "a/b"):
        with pytest.raises(ConfigError, match="no recipe file"):
            find_recipe(name)
    with pytest.raises(ConfigError, match="did you mean 'maskedkd'"):
        find_recipe("maskdkd")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match="no recipe file"):
        find_recipe(str(tmp_path / "folder.yaml"))


def test_a_run_folder_stands_for_its_recipe(tmp_path: Path) -> None:
    recipe = named_recipe("small_images_alone")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert find_recipe(str(tmp_path)) == recipe


# --- values that make no sense together ----------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train.epochs", 0),
        ("train.batch_size", 0),
        ("train.accumulate", 0),
        ("train.eval_every", 0),
        ("train.save_every", 0),
        ("train.log_every", 0),
        ("train.keep_checkpoints", 0),
        ("train.eval_batch_size", -1),
        ("train.ema_decay", 1.0),
        ("optim.lr", 0.0),
        ("optim.lr", -1.0),
        ("optim.weight_decay", -0.1),
        ("optim.clip_grad", 0.0),
        ("optim.layer_decay", 1.5),
        ("optim.momentum", 1.0),
        ("optim.warmup_epochs", -1.0),
        ("optim.min_lr", -1.0),
        ("optim.warmup_lr", -1.0),
        ("student.drop_path", 1.0),
        ("data.workers", -1),
        ("train.seed", 2**64),
        ("train.seed", -(2**63) - 1),
        ("data.seed", 2**64),
    ],
)
def test_values_out_of_range(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{field} is "):
        replace_fields(Recipe(), {field: value})


def test_a_schedule_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="warm up for fewer"):
        replace_fields(Recipe(), {"train.epochs": 5})
    with pytest.raises(ConfigError, match="warmup_epochs cannot take effect"):
        replace_fields(Recipe(), {"optim.sched": "none"})
    assert (
        replace_fields(Recipe(), {"optim.sched": "none", "optim.warmup_epochs": 0}).optim.sched
        == "none"
    )


# --- replacing fields ----------------------------------------------------------------------------


def test_fields_are_replaced_together() -> None:
    recipe = named_recipe("maskedkd")
    changed = replace_fields(
        recipe,
        {
            "train.epochs": 3,
            "optim.warmup_epochs": 1,
            "selector.keep_rate": 0.25,
            "objectives.kd.temperature": "2",
        },
    )
    assert (changed.train.epochs, changed.optim.warmup_epochs) == (3, 1.0)
    assert changed.selector == MaskedKD(keep_rate=0.25)
    assert changed.objectives["kd"] == SoftKD(weight=0.5, temperature=2.0)
    assert (
        replace(
            changed,
            train=recipe.train,
            optim=recipe.optim,
            selector=recipe.selector,
            objectives=recipe.objectives,
        )
        == recipe
    )
    assert recipe == named_recipe("maskedkd")


def test_open_ended_fields_take_new_keys() -> None:
    changed = replace_fields(Recipe(), {"student.model_args.depth": 6, "optim.opt_args.eps": 1e-8})
    assert changed.student.model_args == {"depth": 6} and changed.optim.opt_args == {"eps": 1e-8}
    assert replace_fields(Recipe(), {"selector": {"method": "maskedkd"}}).selector == MaskedKD()


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("optim.lrr", "no field 'optim.lrr' .*did you mean 'lr'"),
        ("optm.lr", "no field 'optm' .*did you mean 'optim'"),
        ("optim.lr.x", "no field 'optim.lr.x'"),
        ("selector.keep_rate", r"has no patch selector: add one first \(--with maskedkd\)"),
        ("masking.mask_rate", r"has no masking: add one first \(--with random_masking\)"),
        (
            "objectives.ce.schedule.to",
            (
                "objectives.ce.schedule is null, so it has no 'to': .*--set"
                " objectives.ce.schedule='{to: 0}'"
            ),
        ),
        ("optim.clip_grad.x", "optim.clip_grad is null, so it has no 'x': set it itself"),
        ("teachers.teacher.model", "no field 'teachers.teacher'"),
        ("", "no field ''"),
        ("..", "no field ''"),
    ],
)
def test_a_wrong_path_is_refused(path: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        replace_fields(Recipe(), {path: 1})


def test_what_is_null_is_set_as_the_refusal_says() -> None:
    schedule = (
        replace_fields(Recipe(), {"objectives.ce.schedule": parse_value("{to: 0}", "--set x")})
        .objectives["ce"]
        .schedule
    )
    assert schedule is not None and schedule.to == 0
    assert replace_fields(Recipe(), {"optim.clip_grad": 3}).optim.clip_grad == 3


@pytest.mark.parametrize("seed", [-(2**63), 0, 2**64 - 1])
def test_every_seed_that_is_taken_is_one_for_torch(seed: int) -> None:
    assert replace_fields(Recipe(), {"train.seed": seed, "data.seed": seed}).train.seed == seed
    torch.Generator().manual_seed(seed)


def test_values_from_the_command_line() -> None:
    assert parse_value("1e-8", "--set x") == 1e-8
    assert parse_value("[1, a]", "--set x") == [1, "a"]
    assert parse_value("no", "--set x") == "no"
    assert parse_value("", "--set x") is None
    with pytest.raises(ConfigError, match="--set x"):
        parse_value("[", "--set x")
    assert convert("3", int | None, "--epochs") == 3
    with pytest.raises(ConfigError, match=r"--epochs is '3\.5': a whole number is needed"):
        convert("3.5", int, "--epochs")


# --- what can change a result --------------------------------------------------------------------


def test_the_fingerprint_sees_what_changes_the_result_and_nothing_else() -> None:
    recipe = named_recipe("small_images_maskedkd")
    flat = flatten(recipe)
    for path in VOLATILE:
        other = replace_fields(
            recipe, {path: {bool: True, int: 7}.get(type(flat[path]), "elsewhere")}
        )
        assert (
            other != recipe
            and fingerprint(other) == fingerprint(recipe)
            and differences(other, recipe) == []
        )
    other = replace_fields(
        recipe, {"selector.keep_rate": 0.25, "train.seed": 1, "student.model_args.depth": 7}
    )
    assert fingerprint(other) != fingerprint(recipe)
    assert differences(other, recipe) == [
        "selector.keep_rate is 0.25 here and 0.5 there",
        "student.model_args.depth is 7 here and 6 there",
        "train.seed is 1 here and 0 there",
    ]
    assert any("selector" in line for line in differences(recipe, replace(recipe, selector=None)))


def test_every_setting_is_documented() -> None:
    for part in (Recipe, StudentConfig, TeacherConfig, OptimConfig, TrainConfig, Augment):
        for field in dataclasses.fields(part):
            documented = part.__doc__ or ""
            assert field.name in documented or field.name in (
                "student",
                "teachers",
                "data",
                "optim",
                "train",
            ), f"{part.__name__}.{field.name}"
