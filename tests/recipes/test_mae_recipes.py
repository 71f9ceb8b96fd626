"""Plain masked autoencoders at 224: MAE's own settings, and a first stage that teaches DMAE."""

import pytest

from vitdistill.distill.plan import make_plan
from vitdistill.methods.mae import PixelReconstruction
from vitdistill.methods.masking import RandomMasking
from vitdistill.recipes.named import named_recipe
from vitdistill.recipes.stages import Stages
from vitdistill.runs.networks import build_blank


def stages(name: str) -> Stages:
    found = named_recipe(name)
    assert (
        isinstance(found, Stages)
        and found.name == name
        and list(found.stages) == ["pretrain", "finetune"]
    )
    return found


@pytest.mark.parametrize("name", ["mae_base", "mae_large"])
def test_pre_training_is_maes(name: str) -> None:
    """PRETRAIN.md of facebookresearch/mae."""
    recipe = stages(name).stages["pretrain"]
    assert not recipe.teachers and recipe.objectives == {"mae": PixelReconstruction(norm_pix=True)}
    assert recipe.masking == RandomMasking(mask_rate=0.75) and recipe.student.init == "mae"
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.optim.lr) == (
        800,
        4096,
        pytest.approx(1.5e-4 * 4096 / 256),
    )
    assert (recipe.optim.warmup_epochs, recipe.optim.weight_decay, recipe.optim.opt_args) == (
        40,
        0.05,
        {"betas": [0.9, 0.95]},
    )
    assert recipe.data.augment.scale == (0.2, 1.0) and recipe.data.augment.aa is None


@pytest.mark.parametrize(
    ("name", "epochs", "lr", "decay", "drop_path"),
    [("mae_base", 100, 5e-4, 0.65, 0.1), ("mae_large", 50, 1e-3, 0.75, 0.2)],
)
def test_fine_tuning_is_maes(
    name: str, epochs: int, lr: float, decay: float, drop_path: float
) -> None:
    """FINETUNE.md of facebookresearch/mae."""
    recipe = stages(name).stages["finetune"]
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.optim.lr) == (
        epochs,
        1024,
        pytest.approx(lr * 1024 / 256),
    )
    assert (recipe.optim.layer_decay, recipe.student.drop_path, recipe.optim.warmup_epochs) == (
        decay,
        drop_path,
        5,
    )
    augment = recipe.data.augment
    assert (augment.aa, augment.reprob, augment.mixup, augment.cutmix) == (
        "rand-m9-mstd0.5-inc1",
        0.25,
        0.8,
        1.0,
    )


@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "student", "size"),
    [
        ("mae_base", "dmae_small_from_mae_base", 86e6),
        ("mae_large", "dmae_base_from_mae_large", 303e6),
    ],
)
def test_what_they_pre_train_teaches_dmae(name: str, student: str, size: float) -> None:
    built, _ = build_blank(stages(name).stages["pretrain"], 1)
    assert (
        built.network.num_parameters == pytest.approx(size, rel=0.01)
        and built.network.num_classes == 0
    )
    published = stages(student).stages["pretrain"]
    learner, teachers = build_blank(published, 1)
    theirs = teachers["teacher"].network
    assert (built.network.grid, built.network.depth, built.network.dim) == (
        theirs.grid,
        theirs.depth,
        theirs.dim,
    )
    assert (
        built.spec.mean == teachers["teacher"].spec.mean == learner.spec.mean
    )  # ImageNet's, as Meta's files want it
    assert make_plan(
        learner.network, {"teacher": built.network}, published.objectives, None, published.masking
    )
