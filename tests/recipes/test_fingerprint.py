"""A run is known by what can change its result, and by nothing else."""

from dataclasses import replace

import pytest

from vitdistill.recipes.convert import flatten, replace_fields
from vitdistill.recipes.fingerprint import VOLATILE, differences, fingerprint
from vitdistill.recipes.named import named_recipe
from vitdistill.recipes.stages import Stages

RECORDED = {
    "alone": "6562995d81c1718d",
    "kd": "90b562540c9d162d",
    "hard_kd": "456ef1e7133afd03",
    "maskedkd": "30ccd098b33cdd59",
    "nkd": "7bd64c10fab0b5c8",
    "vitkd": "c836a93f370ed031",
    "vitkd_nkd": "8f850d0702f8d1ad",
    "deit_tiny": "6562995d81c1718d",
    "deit_tiny_distilled": "77e53d22f2d00fc7",
    "deit_tiny_from_deit_small": "a4d8d803d2699588",
    "deit_tiny_from_deit3_small": "16d006737bb19f87",
    "deit_tiny_from_deit3_base": "e7d02190091bb3c5",
    "deit_small_from_deit_base": "7863bd4fb7c0ef22",
    "deit_small_from_deit3_base": "12e5407680c76a60",
    "deit_base_from_deit3_large": "5c07c65c5b979e46",
    "deit_tiny_nkd": "76d9f71b878a2a70",
    "deit_tiny_vitkd": "6e63b65fcbb5f7c5",
    "deit_tiny_vitkd_nkd": "bf59e7febf179ada",
    "deit_small_nkd": "c5ab7a4ab6795ff0",
    "deit_small_vitkd": "48a2500a5b54c537",
    "deit_small_vitkd_nkd": "b0abf5a1a071ff1e",
    "deit_base_nkd": "ac1ec7c642c7b100",
    "deit_base_vitkd": "38d736df43a20365",
    "deit_base_vitkd_nkd": "060a91d3f662a1db",
    "mae_base": "92ff41cf1296aae3+3c4a0f9654e7898b",
    "mae_large": "f8c4b1bdf57cfd14+61f0d35c0c91c480",
    "dmae_base_from_mae_large": "edd7182e86ec66da+b95bde2c1978352c",
    "dmae_base_from_mae_large_90": "686ac62383f234d7+b95bde2c1978352c",
    "dmae_base_from_mae_large_95": "d46484a9e9e0689c+b95bde2c1978352c",
    "dmae_base_from_mae_large_98": "aa265b32dd6185b2+b95bde2c1978352c",
    "dmae_small_from_mae_base": "42b6bdde676acb22+b95bde2c1978352c",
    "dmae_tiny_from_mae_base": "23f84ea730b534fd+b95bde2c1978352c",
    "dmae_base_from_mae_large:first_release": "546ca29e40559f77+91b47b725ec77c4f",
    "dmae_base_from_mae_large_90:first_release": "3088cadf7a3a7b73+91b47b725ec77c4f",
    "dmae_base_from_mae_large_95:first_release": "89b69bfefacac46b+91b47b725ec77c4f",
    "dmae_base_from_mae_large_98:first_release": "fe78d9f565b303c8+91b47b725ec77c4f",
    "dmae_small_from_mae_base:first_release": "9104c01ae6830b3d+91b47b725ec77c4f",
    "dmae_tiny_from_mae_base:first_release": "cf1e11814e8428f7+91b47b725ec77c4f",
    "libkd": "5b9cc01488394b38",
    "libkd_cit_tiny": "c5aaa7f3807560f8",
    "libkd_cit_small": "927fe134789edc94",
    "small_images_teacher": "aaab6edfb366cb5b",
    "small_images_alone": "a9fe15e99c5fc7a8",
    "small_images_kd": "ff716a45c33e215f",
    "small_images_maskedkd": "0a155f8f785a123d",
    "small_images_nkd": "32f9dfc9dfb325c2",
    "small_images_vitkd": "2808eb4eaa970959",
    "small_images_vitkd_nkd": "6232a9ba9f255e28",
    "small_images_masked_vitkd_nkd": "844c76a223c2c850",
    "small_images_mae": "c743b9a17c428f18",
    "small_images_mae_finetuned": "c743b9a17c428f18+dba6e6ae5281460f",
    "small_images_dmae": "52dc823e5ae242d4+dba6e6ae5281460f",
    "small_images_conv_teacher": "d6992b7a4b1c5b30",
    "small_images_inv_teacher": "92dc4726db20669c",
    "small_images_libkd": "1f3d1be9ff6168b3",
    "small_images_cit": "6816127c6d572845",
}
"""Fingerprints the first version wrote into its runs: with another one they could not be resumed."""

_HALVES = {
    "objectives.ce.weight": 0.5,
    "objectives.kd.weight": 0.5,
    "objectives.kd.temperature": 2.0,
}
CHANGED = {"small_images_kd": _HALVES, "small_images_maskedkd": _HALVES}
"""What the first version had in place of the values that a recipe has now."""


@pytest.mark.parametrize("name", RECORDED)
def test_runs_of_the_first_version_are_known(name: str) -> None:
    recipe = named_recipe(name)
    if name in CHANGED:
        assert not isinstance(recipe, Stages)
        recipe = replace_fields(recipe, CHANGED[name])
    found = recipe.stages if isinstance(recipe, Stages) else {"": recipe}
    assert "+".join(fingerprint(stage)[:16] for stage in found.values()) == RECORDED[name]


def test_the_fingerprint_sees_what_changes_the_result_and_nothing_else() -> None:
    recipe = named_recipe("small_images_maskedkd")
    assert not isinstance(recipe, Stages)
    flat = flatten(recipe)
    for path in VOLATILE:
        old = flat[path]
        new = not old if isinstance(old, bool) else 7 if isinstance(old, int) else "elsewhere"
        new = {"data.val_split": 0.5, "train.log_to": ["mlflow"]}.get(path, new)
        other = replace_fields(recipe, {path: new})
        assert other != recipe and fingerprint(other) == fingerprint(recipe)
        assert differences(other, recipe) == []
    changes = {"selector.keep_rate": 0.25, "train.seed": 1, "student.model_args.depth": 7}
    other = replace_fields(recipe, changes)
    assert fingerprint(other) != fingerprint(recipe)
    assert [line.split()[0] for line in differences(other, recipe)] == [
        "selector.keep_rate",
        "student.model_args.depth",
        "train.seed",
    ]
    assert any("selector" in line for line in differences(recipe, replace(recipe, selector=None)))
