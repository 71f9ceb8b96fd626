"""Files of plain ViTs, masked autoencoders and Hugging Face: each ends as the same network."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import checkpoint_filter_fn

from tests.weights.networks import (
    NAME,
    TINY,
    State,
    encoder_of,
    equal,
    features,
    hugging_face,
    mae,
    tiny,
    without,
    write,
)
from vitdistill.data.augment import InputSpec
from vitdistill.data.model_input import input_spec_of
from vitdistill.errors import DataError, Set
from vitdistill.weights.create import class_names, create_model
from vitdistill.weights.export import export_timm
from vitdistill.weights.files import load_state_dict
from vitdistill.weights.load import load_into
from vitdistill.weights.vit_checkpoints import Target

DECODER = 2 + 2 + 12 + 2 + 2  # tensors


def load_weights(model: torch.nn.Module, path: Path, fresh_head: bool = False) -> None:
    load_into(Target(model, str(path), fresh_head), load_state_dict(path))


# -- what does not fit ----------------------------------------------------------------------------


def decoder_of(model: torch.nn.Module) -> State:
    return {k: v for k, v in model.state_dict().items() if k.startswith(("decoder_", "mask_token"))}


REFUSED = {
    "1 key missing ('cls_token')": lambda: without(tiny().state_dict(), "cls_token"),
    "1 key unexpected ('extra')": lambda: {**tiny().state_dict(), "extra": torch.ones(1)},
    "2 keys of another shape ('head.weight (7, 24) instead of (5, 24)', 'head.bias": (
        lambda: tiny(num_classes=7).state_dict()
    ),
    "1 key of another shape": lambda: {**tiny().state_dict(), "norm.weight": torch.tensor(1.0)},
    "keys of another shape": lambda: tiny(embed_dim=12).state_dict(),
    "12 keys unexpected ('blocks.2.attn.proj.bias'": lambda: tiny(depth=3).state_dict(),
    "decoder of a masked autoencoder and no encoder": lambda: decoder_of(mae()),
    "of a masked autoencoder and no encoder": lambda: hugging_face(decoder_of(mae())),
    "has patches of 4 x 4": lambda: encoder_of(mae(image_size=16, patch_size=4)),
    "has patches of 8 x 4": lambda: hugging_face(mae(patch_size=(8, 4)).state_dict()),
    "norms its features after pooling (fc_norm)": lambda: tiny(global_pool="avg").state_dict(),
    f"holds nothing of {NAME}: its tensors are called 'a', 'b', 'c', ...": (
        lambda: {key: torch.ones(1) for key in "abcd"}
    ),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_a_file_that_does_not_fit_is_named_and_changes_nothing(tmp_path, sentence):
    path = write(tmp_path / "w.safetensors", REFUSED[sentence]())
    model, before = tiny(3), tiny(3)
    with pytest.raises(DataError, match=re.escape(sentence)) as caught:
        load_weights(model, path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert str(caught.value).startswith(str(path)) and equal(
        model.state_dict(), before.state_dict()
    )


def test_a_fresh_head_is_only_for_who_asked_and_only_for_headless_files(tmp_path):
    headless = write(tmp_path / "mae.pth", encoder_of(mae()))
    whole = write(tmp_path / "whole.pth", tiny(1).state_dict())
    with pytest.raises(DataError, match=r"2 keys missing \('head.weight', 'head.bias'\)"):
        load_weights(tiny(), headless)
    with pytest.raises(DataError, match=r"head.weight \(5, 24\) instead of \(7, 24\)"):
        load_weights(tiny(num_classes=7), whole)


def test_patches_of_another_size_are_resampled_for_a_network_that_will_be_trained(tmp_path, caplog):
    source, model = tiny(1), tiny(2, patch_size=4)
    load_weights(model, write(tmp_path / "w.safetensors", source.state_dict()), fresh_head=True)
    assert f"timm's converter for {NAME} was applied" in caplog.text
    assert "patch_embed.proj.weight from (24, 3, 8, 8) to (24, 3, 4, 4)" in caplog.text
    assert "resampled from 4 x 4 patches to 8 x 8" in caplog.text
    assert torch.equal(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    expected = checkpoint_filter_fn(dict(source.state_dict()), model)
    assert torch.equal(model.pos_embed, expected["pos_embed"])


SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
OTHERS = {  # networks of several families, small, and how else they may be built
    NAME: ({**SMALL, "patch_size": 8}, [16, 4]),
    "eva02_tiny_patch14_224": ({**SMALL, "patch_size": 8}, [16, 4]),
    "beit_base_patch16_224": ({**SMALL, "patch_size": 8}, [16, 4]),
    "vit_tiny_patch16_224.mae": ({**SMALL, "patch_size": 8, "global_pool": "avg"}, [(8, 4)]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_network_that_answers_as_it_is_has_the_patches_of_its_file(tmp_path, name, caplog):
    """The remedy of the refusal builds the network of the file; another image size is said."""
    args, sizes = OTHERS[name]
    name = name.partition(".")[0]
    for number, patch in enumerate(sizes):
        source = create_model(name, num_classes=5, image_size=32, **{**args, "patch_size": patch})
        path = write(tmp_path / f"{number}.safetensors", source.state_dict())
        with pytest.raises(DataError) as caught:
            create_model(name, checkpoint=path, image_size=32, **args)
        remedy = caught.value.fixes[0]
        assert isinstance(remedy, Set) and remedy.field == "model_args.patch_size"
        build = {**args, "patch_size": remedy.value}
        caplog.clear()
        images = torch.randn(2, 3, 32, 32)
        same = create_model(name, checkpoint=path, image_size=32, **build).eval()
        assert torch.equal(same(images), source.eval()(images)) and not caplog.text
        try:
            create_model(name, checkpoint=path, image_size=64, **build)
        except DataError:  # where the positions lie is not known, or BEiT's table is too small
            continue
        assert "resampled" in caplog.text


# -- masked autoencoders --------------------------------------------------------------------------

_DROPPED = f"{DECODER} tensors of its decoder are not used; "
_RENAMED = "its names are another library's, and were translated; "
FILES = {
    "encoder": (encoder_of, ""),
    "full": (lambda model: model.state_dict(), _DROPPED),
    "dmae": (
        lambda model: {**model.state_dict(), "aligned_feature_projection_heads.0.w": torch.ones(1)},
        _DROPPED.replace(str(DECODER), str(DECODER + 1)),
    ),
    "hf-full": (lambda model: hugging_face(model.state_dict()), _RENAMED + _DROPPED),
    "hf-encoder": (lambda model: hugging_face(encoder_of(model)), _RENAMED),
    "hf-model": (lambda model: hugging_face(encoder_of(model), ""), _RENAMED),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_teacher_from_any_mae_checkpoint_has_its_features(tmp_path, caplog, kind):
    source, (state_of, said) = mae(1), FILES[kind]
    path = write(tmp_path / "mae.safetensors", state_of(source))
    teacher = create_model(NAME, checkpoint=path, **TINY)
    images = torch.randn(2, 3, 32, 32)
    assert teacher.num_classes == 0 and equal(teacher.state_dict(), encoder_of(source))
    assert torch.equal(features(teacher, images), source.forward_features(images))
    (note,) = caplog.messages
    assert note.startswith(f"{path}: {said}images are normalised as ")
    spec, imagenet = input_spec_of(teacher), (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert ((spec.mean, spec.std) == imagenet) == kind.endswith(("full", "dmae"))


@pytest.mark.parametrize("kind", ["full", "hf-full"])
def test_an_autoencoder_takes_its_decoder_too(tmp_path, kind):
    source, model = mae(1), mae(2)
    load_weights(model, write(tmp_path / "mae.pth", FILES[kind][0](source)))
    assert equal(model.state_dict(), source.state_dict())
    with pytest.raises(DataError, match=rf"{DECODER} keys missing \('mask_token', 'decoder_pos"):
        load_weights(model, write(tmp_path / "encoder.pth", encoder_of(source)))


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("num_classes", [0, 7])
@pytest.mark.parametrize("kind", ["encoder", "hf-full", "folder"])
def test_a_student_from_a_headless_file_has_what_is_missing_fresh(
    tmp_path, caplog, kind, num_classes, pool
):
    if kind == "folder":
        source = exported(tmp_path / "run").state_dict()
        student = create_model(str(tmp_path / "run"), num_classes=num_classes, global_pool=pool)
    else:
        source, path = encoder_of(mae(1)), tmp_path / "mae.pth"
        write(path, FILES[kind][0](mae(1)))
        options = {"num_classes": num_classes, "global_pool": pool, **TINY}
        student = create_model(NAME, checkpoint=path, **options)
    # A network that averages patches norms after pooling, so the file's norm of tokens is left out.
    kept = without(source, "norm.") if pool == "avg" else source
    fresh = ["fc_norm.weight", "fc_norm.bias"] * (pool == "avg")
    fresh += ["head.weight", "head.bias"] * bool(num_classes)
    state = student.state_dict()
    assert equal({key: state[key] for key in kept}, kept)
    assert state.keys() - kept.keys() == set(fresh) and student.num_classes == num_classes
    note = f"it has no classifier: {', '.join(fresh)} start fresh"
    note += "; its final norm is not used" * (pool == "avg")
    assert (note in caplog.text) == bool(fresh) and class_names(student) is None
    assert student(torch.zeros(1, 3, 32, 32)).shape == (1, num_classes or 24)


@pytest.mark.parametrize("num_classes", [0, 7])
def test_a_network_with_another_pool_leaves_the_attention_pool_out(tmp_path, caplog, num_classes):
    name = "vit_base_patch16_siglip_224"
    source = create_model(name, num_classes=0, **TINY).state_dict()
    options = {"checkpoint": write(tmp_path / "pooled.pth", source), **TINY}
    assert equal(create_model(name, num_classes=0, **options).state_dict(), source)
    assert "pooling layer" not in caplog.text
    student = create_model(name, num_classes=num_classes, global_pool="avg", **options).state_dict()
    kept = without(source, "attn_pool.", "norm.")
    assert len(kept) < len(source) - 8 and equal({k: student[k] for k in kept}, kept)
    assert "its pooling layer is not used" in caplog.text


# -- folders and positions ------------------------------------------------------------------------

SPEC = InputSpec((32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear", 1.0)


def exported(folder: Path, architecture: str = NAME, classes: int = 0, **changes):
    """What a run writes; without classes: what a pre-training does."""
    sizes = {"img_size": (32, 32), "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2}
    sizes |= changes
    model = create_model(architecture, num_classes=classes, **sizes).eval()
    names, spec = (
        [f"c{i}" for i in range(classes)] or None,
        replace(SPEC, image_size=sizes["img_size"]),
    )
    options = {"architecture": architecture, "model_args": sizes}
    export_timm(model, folder, classes=names, input_spec=spec, **options)
    return model


def test_a_distilled_folder_without_classes_has_both_heads_fresh(tmp_path, caplog):
    source = exported(tmp_path / "pretrained", "deit_tiny_distilled_patch16_224").state_dict()
    student = create_model(str(tmp_path / "pretrained"), num_classes=7)
    assert student.head_dist.weight.shape == (7, 24)
    assert equal({key: student.state_dict()[key] for key in source}, source)
    assert "head.weight, head.bias, head_dist.weight, head_dist.bias start fresh" in caplog.text


def test_a_folder_without_classes_but_with_its_own_mean_norm_keeps_it(tmp_path):
    source = exported(tmp_path / "run", global_pool="avg")
    student = create_model(str(tmp_path / "run"), num_classes=7)
    assert torch.equal(student.fc_norm.weight, source.fc_norm.weight)
    with pytest.raises(DataError, match="fc_norm"):
        create_model(str(tmp_path / "run"), num_classes=7, global_pool="token")


def resampled(table: torch.Tensor, its: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """A table of positions, moved from one grid to another, a feature at a time."""
    moved = [
        F.interpolate(one.reshape(1, 1, *its), size=grid, mode="bicubic", antialias=True).flatten()
        for one in table[0, 1:].T
    ]
    return torch.cat([table[:, :1], torch.stack(moved, 1)[None]], dim=1)


MOVES = {
    "as many patches on another grid": ((32, 32), (16, 64)),
    "as many patches on a square": ((16, 64), (32, 32)),
    "as many patches, turned": ((16, 32), (32, 16)),
    "from a square number that is no square": ((16, 64), (24, 72)),
    "from a number that is no square": ((16, 32), (32, 32)),
    "from a square": ((32, 32), (64, 64)),
    "not at all": ((16, 64), (16, 64)),
}


@pytest.mark.parametrize(("saved_classes", "num_classes"), [(0, 7), (5, None)])
@pytest.mark.parametrize("move", MOVES)
def test_positions_of_a_folder_lie_where_its_images_were(
    tmp_path, caplog, move, saved_classes, num_classes
):
    trained, built = MOVES[move]
    source = exported(tmp_path / "run", classes=saved_classes, img_size=trained)
    model = create_model(str(tmp_path / "run"), num_classes=num_classes, image_size=built)
    its, grid = ((height // 8, width // 8) for height, width in (trained, built))
    assert torch.allclose(model.pos_embed, resampled(source.pos_embed, its, grid), atol=1e-6)
    note = f"resampled from {its[0]} x {its[1]} patches to {grid[0]} x {grid[1]}"
    assert (note in caplog.text) == (its != grid)
    assert torch.equal(model.blocks[1].mlp.fc2.weight, source.blocks[1].mlp.fc2.weight)
    assert model.num_classes == (num_classes or saved_classes)
    assert model.pretrained_cfg["input_size"] == (3, *built)


@pytest.mark.parametrize(
    ("trained", "built", "grid"),
    [
        ((32, 32), (48, 32), (4, 4)),
        ((16, 32), (16, 32), (2, 4)),
        ((32, 32), (16, 64), None),
        ((16, 64), (16, 64), None),
        ((16, 32), (32, 32), None),
        ((16, 32), (32, 64), None),
    ],
)
def test_a_file_alone_is_of_square_images_or_of_the_networks(tmp_path, trained, built, grid):
    source = tiny(1, num_classes=0, image_size=trained)
    path = write(tmp_path / "w.safetensors", source.state_dict())
    options = {**TINY, "image_size": built}
    if grid is None:
        with pytest.raises(DataError, match="does not say in what rows and columns its") as caught:
            create_model(NAME, checkpoint=path, num_classes=3, **options)
        assert str(caught.value).startswith(str(path))
        return
    model = create_model(NAME, checkpoint=path, **options)
    expected = resampled(source.pos_embed, grid, (built[0] // 8, built[1] // 8))
    assert torch.allclose(model.pos_embed, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["full", "encoder"])
@pytest.mark.parametrize("name", ["vit_base_patch16_224", "vit_base_patch16_224.mae", "folder"])
def test_the_normalisation_of_a_masked_autoencoders_file(tmp_path, caplog, name, kind):
    """A name decides it, but a plain one whose normalisation the file tells to be another's."""
    path = write(tmp_path / "w.safetensors", FILES[kind][0](mae(1)))
    if name == "folder":
        exported(tmp_path / "run")
        spec = input_spec_of(create_model(str(tmp_path / "run"), checkpoint=path))
        expected = (SPEC.mean, SPEC.std)
    else:
        spec = input_spec_of(create_model(name, checkpoint=path, num_classes=3, **TINY))
        plain = "." not in name and kind == "encoder"
        expected = ((0.5,) * 3,) * 2 if plain else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert (spec.mean, spec.std) == expected
    assert ("images are normalised as" in caplog.text) == (name == "vit_base_patch16_224")


@pytest.mark.parametrize("name", ["efficientnet_lite0", "mobilenetv3_small_050", "resnet10t"])
def test_a_new_classifier_of_a_cnn_begins_without_a_verdict(tmp_path, name):
    """timm draws EfficientNet's from +-0.3: a loss of 11 over ten classes before the first step."""
    trained = timm.create_model(name, num_classes=1000)
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    model = create_model(name, num_classes=10, checkpoint=tmp_path / "weights.pth")
    assert 0 < model.get_classifier().weight.std() <= 0.06
    others = {key for key, value in model.state_dict().items() if key not in trained.state_dict()}
    assert not others
