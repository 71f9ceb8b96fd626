"""Names and weight files: loaded strictly or refused in one sentence, and never executed."""

import argparse
import io
import json
import os
import pickle
import random
import re
import shlex
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import checkpoint_filter_fn

from vitdistill.data.augment import InputSpec
from vitdistill.data.model_input import input_spec_of
from vitdistill.errors import ConfigError, DataError, UserError
from vitdistill.models.mae import MaskedAutoencoder
from vitdistill.vit.needs import Needs
from vitdistill.vit.walk import run_vit
from vitdistill.weights.create import class_names, create_model
from vitdistill.weights.export import export_timm
from vitdistill.weights.files import load_state_dict
from vitdistill.weights.load import load_weights

TINY = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2}
NAME = "vit_tiny_patch16_224"


def tiny(seed: int = 0, **changes) -> torch.nn.Module:
    torch.manual_seed(seed)
    return create_model(NAME, **{"num_classes": 5, **TINY, **changes}).eval()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def torch_bytes(content: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def refused(path: Path, kind: type[UserError] = DataError) -> str:
    with pytest.raises(kind) as caught:
        load_state_dict(path)
    sentence = str(caught.value)
    assert "\n" not in sentence and str(path) in sentence and sentence.count("Traceback") == 0
    return sentence


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("vit_tinny_patch16_224", {}, "did you mean 'vit_tiny_patch16_224'"),
        ("qqqqqqqqqq", {}, "list_models"),
        (NAME + ".nosuch", {}, "'nosuch': choose from augreg_in21k_ft_in1k"),
        (NAME, {"fooo": 1}, "takes no argument 'fooo'"),
        (NAME, {"embed_dim": 193}, "cannot be built with embed_dim=193"),
        (NAME, {"image_size": 30}, "16 x 16, which do not fill 30 x 30"),
        (NAME, {"drop_path": 0.1, "drop_path_rate": 0.1}, "the same setting"),
        (NAME, {"pretrained": True, "checkpoint": "x.pth"}, "both pretrained"),
        ("no/such/folder", {}, "hf-hub:no/such/folder"),
        ("local-dir:/no/such/folder", {}, "no folder /no/such/folder"),
    ],
)
def test_wrong_names_and_arguments_are_one_sentence(name, options, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        create_model(name, **options)
    assert "\n" not in str(caught.value)


def test_settings_reach_the_network():
    model = tiny(drop_path=0.2, in_chans=1)
    assert model.num_classes == 5 and model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert model.pretrained_cfg["input_size"] == (1, 32, 32)
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 5)
    assert create_model("resnet18", image_size=(64, 32)).pretrained_cfg["input_size"] == (3, 64, 32)
    assert NAME in timm.list_models() and tiny(image_size=(16, 24)).patch_embed.grid_size == (2, 3)


def test_a_timm_name_wins_over_a_folder_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet18").mkdir()
    assert type(create_model("resnet18", num_classes=2)).__name__ == "ResNet"


def test_without_network_pretrained_is_one_sentence(monkeypatch):
    for name, options in ((NAME, {"pretrained": True}), ("hf-hub:timm/" + NAME, {})):
        with pytest.raises(DataError, match="without network, download") as caught:
            create_model(name, **options)
        assert "\n" not in str(caught.value)


# -- loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrapper", "prefix", "suffix"),
    [
        (None, "", ".pth"),
        ("model", "module.", ".pt"),
        ("state_dict", "_orig_mod.", ".bin"),
        ("model_ema", "module._orig_mod.", ".tar"),
        ("state_dict_ema", "", ".pth"),
    ],
)
def test_wrapped_and_prefixed_files_load(tmp_path, wrapper, prefix, suffix):
    state = tiny(1).state_dict()
    content = {prefix + key: value for key, value in state.items()}
    path = tmp_path / f"w{suffix}"
    path.write_bytes(torch_bytes(content if wrapper is None else {wrapper: content, "epoch": 3}))
    assert equal(create_model(NAME, num_classes=5, checkpoint=path, **TINY).state_dict(), state)


def test_the_average_is_preferred_and_compiled_blocks_are_unwrapped(tmp_path):
    state, other = tiny(1).state_dict(), tiny(2).state_dict()
    inner = {key.replace("blocks.0.", "blocks.0._orig_mod."): value for key, value in state.items()}
    (tmp_path / "w.pth").write_bytes(torch_bytes({"state_dict": other, "state_dict_ema": inner}))
    assert equal(load_state_dict(tmp_path / "w.pth"), state)
    (tmp_path / "twice.pth").write_bytes(
        torch_bytes({"a": torch.ones(1), "module.a": torch.ones(1)})
    )
    assert "twice" in refused(tmp_path / "twice.pth")


def test_safetensors_load_under_either_name(tmp_path):
    state = tiny(1).state_dict()
    for name in ("w.safetensors", "w.bin"):
        (tmp_path / name).write_bytes(safetensors.torch.save(state))
        assert equal(load_state_dict(tmp_path / name), state)


def test_keys_that_differ_are_counted_and_named(tmp_path):
    state = tiny(1).state_dict()
    cases = {
        r"1 key missing \(\'cls_token\'\)": {k: v for k, v in state.items() if k != "cls_token"},
        r"30 keys missing \(\'cls_token\', \'pos_embed\', .*, \.\.\.\)": {
            "head.weight": state["head.weight"],
            "head.bias": state["head.bias"],
        },
        r"1 key unexpected \(\'extra\'\)": {**state, "extra": torch.ones(1)},
        r"2 keys of another shape \('head.weight \(7, 24\) instead of \(5, 24\)', 'head.bias": (
            tiny(num_classes=7).state_dict()
        ),
        r"1 key of another shape": {
            **state,
            "norm.weight": torch.tensor(1.0),
        },
    }
    before = tiny(3)
    for sentence, content in cases.items():
        path = tmp_path / "w.safetensors"
        path.write_bytes(safetensors.torch.save(content))
        model = tiny(3)
        with pytest.raises(DataError, match=sentence) as caught:
            load_weights(model, path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
        assert equal(model.state_dict(), before.state_dict())


def test_positions_of_another_image_size_are_resampled_as_timm_does(tmp_path, caplog):
    small, large = tiny(1), tiny(1, image_size=64)
    (tmp_path / "w.safetensors").write_bytes(safetensors.torch.save(small.state_dict()))
    load_weights(large, tmp_path / "w.safetensors")
    said = "its positions were resampled from 4 x 4 patches to 8 x 8"
    assert caplog.messages == [f"{tmp_path / 'w.safetensors'}: {said}"]
    assert torch.equal(large.blocks[0].attn.qkv.weight, small.blocks[0].attn.qkv.weight)
    assert torch.equal(
        large.pos_embed, checkpoint_filter_fn(dict(small.state_dict()), large)["pos_embed"]
    )


def test_patches_of_another_size_go_through_timms_converter(tmp_path, caplog):
    source, model = tiny(1), tiny(2, patch_size=4)
    load_weights(model, write(tmp_path / "w.safetensors", source.state_dict()))
    assert (
        f"timm's converter for {NAME} was applied" in caplog.text
        and "resampled from 4 x 4 patches to 8 x 8" in caplog.text
    )
    assert torch.equal(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    assert torch.equal(
        model.pos_embed, checkpoint_filter_fn(dict(source.state_dict()), model)["pos_embed"]
    )


# -- masked autoencoders, and other files without a classifier ------------------------------------

ENCODER = 4 + 2 * 12 + 2  # class token, positions, patch projection; 12 a block; the final norm
DECODER = 2 + 2 + 12 + 2 + 2


def mae(seed: int = 0, **changes) -> MaskedAutoencoder:
    """An autoencoder whose encoder is `tiny`'s, with nothing at its initial value, so that no
    tensor can stand in for another.
    """
    torch.manual_seed(seed)
    sizes = {"image_size": 32, "patch_size": 8, "dim": 24, "depth": 2, "num_heads": 2}
    model = MaskedAutoencoder(
        **{**sizes, "decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, **changes}
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def encoder_of(model: MaskedAutoencoder) -> dict[str, torch.Tensor]:
    return {
        key: value
        for key, value in model.state_dict().items()
        if not key.startswith(("decoder_", "mask_token"))
    }


def hugging_face(state: dict[str, torch.Tensor], base: str) -> dict[str, torch.Tensor]:
    """The same tensors under the names of transformers' ViTMAE."""
    names = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
    }
    names |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    whole = {
        "cls_token": f"{base}embeddings.cls_token",
        "pos_embed": f"{base}embeddings.position_embeddings",
        "patch_embed.proj.weight": f"{base}embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": f"{base}embeddings.patch_embeddings.projection.bias",
        "norm.weight": f"{base}layernorm.weight",
        "norm.bias": f"{base}layernorm.bias",
    }
    renamed = {}
    for key, value in state.items():
        block = re.fullmatch(r"(decoder_)?blocks\.(\d+)\.(.+)\.(weight|bias)", key)
        if block is None:
            renamed[whole.get(key, f"decoder.{key}")] = value
            continue
        layers = (
            f"decoder.decoder_layers.{block[2]}" if block[1] else f"{base}encoder.layer.{block[2]}"
        )
        if block[3] == "attn.qkv":
            for part, tensor in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[f"{layers}.attention.attention.{part}.{block[4]}"] = tensor.clone()
        else:
            renamed[f"{layers}.{names[block[3]]}.{block[4]}"] = value
    return renamed


def write(path: Path, state: dict[str, torch.Tensor]) -> Path:
    path.write_bytes(
        safetensors.torch.save(state)
        if path.suffix == ".safetensors"
        else torch_bytes({"model": state})
    )
    return path


@torch.no_grad()
def features(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    recorded = run_vit(model.eval(), images, Needs(features=True)).features
    assert recorded is not None
    return recorded


KINDS = ("encoder", "full", "hf-full", "hf-encoder", "hf-model")

_DROPPED = f"{DECODER} tensors of its decoder are not used"
_RENAMED = "its names are Hugging Face's, and were translated"
MADE_OF = {
    "encoder": "",
    "full": f"{_DROPPED}; ",
    "hf-full": f"{_RENAMED}; {_DROPPED}; ",
    "hf-encoder": f"{_RENAMED}; ",
    "hf-model": f"{_RENAMED}; ",
}


def file_of(kind: str, model: MaskedAutoencoder) -> dict[str, torch.Tensor]:
    state = model.state_dict() if kind.endswith("full") else encoder_of(model)
    if kind.startswith("hf"):
        state = hugging_face(state, "" if kind == "hf-model" else "vit.")
    return state


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_from_any_mae_checkpoint_has_its_features(tmp_path, caplog, kind):
    source = mae(1)
    path = write(tmp_path / "mae.safetensors", file_of(kind, source))
    teacher = create_model(NAME, checkpoint=path, **TINY)
    images = torch.randn(2, 3, 32, 32)
    assert teacher.num_classes == 0 and equal(teacher.state_dict(), encoder_of(source))
    assert torch.equal(features(teacher, images), source.forward_features(images))
    (note,) = caplog.messages
    assert note.startswith(f"{path}: {MADE_OF[kind]}images are normalised as ")
    assert (input_spec_of(teacher).mean == IMAGENET_DEFAULT_MEAN) == kind.endswith("full")
    assert (input_spec_of(teacher).std == IMAGENET_DEFAULT_STD) == kind.endswith("full")
    asked = create_model(NAME, num_classes=0, checkpoint=path, **TINY)
    assert equal(asked.state_dict(), teacher.state_dict())
    plain = tiny(2, num_classes=0)
    load_weights(plain, path)
    assert equal(plain.state_dict(), teacher.state_dict())


def test_the_projections_of_dmae_are_left_with_the_decoder(tmp_path, caplog):
    source = mae(1)
    state = {**source.state_dict(), "aligned_feature_projection_heads.0.weight": torch.ones(2, 2)}
    teacher = create_model(NAME, checkpoint=write(tmp_path / "dmae.pth", state), **TINY)
    assert (
        equal(teacher.state_dict(), encoder_of(source))
        and f"{DECODER + 1} tensors of its decoder" in caplog.text
    )


@pytest.mark.parametrize("kind", ["full", "hf-full"])
@torch.no_grad()
def test_an_autoencoder_takes_its_decoder_too(tmp_path, caplog, kind):
    source, model = mae(1), mae(2)
    load_weights(model, write(tmp_path / "mae.pth", file_of(kind, source)))
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    assert caplog.messages == [f"{tmp_path / 'mae.pth'}: {_RENAMED}"] * kind.startswith("hf")
    assert equal(model.state_dict(), source.state_dict())
    assert torch.equal(model(images, noise)[0], source(images, noise)[0])
    with pytest.raises(
        DataError, match=rf"{DECODER} keys missing \(\'mask_token\', \'decoder_pos_embed"
    ):
        load_weights(model, write(tmp_path / "encoder.pth", encoder_of(source)))


@pytest.mark.parametrize("kind", ["encoder", "hf-full"])
def test_a_student_from_a_headless_file_has_a_fresh_head(tmp_path, caplog, kind):
    source = mae(1)
    path = write(tmp_path / "mae.pth", file_of(kind, source))
    student = create_model(NAME, num_classes=7, checkpoint=path, **TINY)
    state = student.state_dict()
    assert state.keys() - encoder_of(source).keys() == {"head.weight", "head.bias"}
    assert equal({key: state[key] for key in encoder_of(source)}, encoder_of(source))
    assert state["head.weight"].shape == (7, 24) and state["head.weight"].std() > 0
    head = "it has no classifier: head.weight, head.bias start fresh"
    (note,) = caplog.messages
    assert note.startswith(f"{path}: {MADE_OF[kind]}{head}; images are normalised as ")
    assert student(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize("num_classes", [None, 0, 7])
def test_averaging_the_patches_leaves_the_final_norm_out(tmp_path, caplog, num_classes):
    source = mae(1)
    path = write(tmp_path / "mae.pth", source.state_dict())
    student = create_model(
        NAME, num_classes=num_classes, checkpoint=path, global_pool="avg", **TINY
    )
    state, encoder = student.state_dict(), encoder_of(source)
    kept = {key: value for key, value in encoder.items() if not key.startswith("norm.")}
    assert equal({key: state[key] for key in kept}, kept)
    fresh = [
        "fc_norm.weight",
        "fc_norm.bias",
        *(["head.weight", "head.bias"] if num_classes else []),
    ]
    assert state.keys() - kept.keys() == set(fresh)
    assert (state["fc_norm.weight"] == 1).all() and (state["fc_norm.bias"] == 0).all()
    assert (
        f"has no classifier: {', '.join(fresh)} start fresh; its final norm is not used"
        in caplog.text
    )


@pytest.mark.parametrize("num_classes", [0, 7])
def test_a_network_with_another_pool_leaves_the_attention_pool_out(tmp_path, caplog, num_classes):
    source = create_model("vit_base_patch16_siglip_224", num_classes=0, **TINY)
    path = write(tmp_path / "pooled.pth", source.state_dict())
    student = create_model(
        "vit_base_patch16_siglip_224",
        num_classes=num_classes,
        checkpoint=path,
        global_pool="avg",
        **TINY,
    )
    kept = {
        key: value
        for key, value in source.state_dict().items()
        if not key.startswith(("attn_pool.", "norm."))
    }
    assert len(kept) < len(source.state_dict()) - 8 and equal(
        {key: student.state_dict()[key] for key in kept}, kept
    )
    assert "its attention pool is not used" in caplog.text
    caplog.clear()
    assert equal(
        create_model(
            "vit_base_patch16_siglip_224", num_classes=0, checkpoint=path, **TINY
        ).state_dict(),
        source.state_dict(),
    )
    assert "attention pool" not in caplog.text


def test_a_fresh_head_is_only_for_who_asked_and_only_for_headless_files(tmp_path):
    headless, whole = (
        write(tmp_path / "mae.pth", encoder_of(mae(1))),
        write(tmp_path / "whole.pth", tiny(1).state_dict()),
    )
    with pytest.raises(DataError, match=r"2 keys missing \(\'head.weight\', \'head.bias\'\)"):
        load_weights(tiny(), headless)
    with pytest.raises(DataError, match=r"head.weight \(5, 24\) instead of \(7, 24\)"):
        create_model(NAME, num_classes=7, checkpoint=whole, **TINY)
    with pytest.raises(DataError, match=r"2 keys unexpected \(\'head.weight\', \'head.bias\'\)"):
        create_model(NAME, num_classes=0, checkpoint=whole, **TINY)
    pooled = write(
        tmp_path / "tuned.pth", tiny(1, global_pool="avg").state_dict()
    )  # Meta's fine-tuned files are such
    with pytest.raises(DataError, match=r"norms its features after pooling \(fc_norm\)"):
        create_model(NAME, checkpoint=pooled, **TINY)
    with pytest.raises(
        DataError,
        match=r"2 keys missing \('fc_norm.weight', 'fc_norm.bias'\); 2 keys unexpected",
    ):
        create_model(NAME, checkpoint=whole, global_pool="avg", **TINY)
    assert create_model(NAME, checkpoint=pooled, global_pool="avg", **TINY).num_classes == 5
    without = {
        key: value for key, value in encoder_of(mae(1)).items() if key != "blocks.1.norm2.bias"
    }
    with pytest.raises(DataError, match=r": 1 key missing \(\'blocks.1.norm2.bias\'\)"):
        create_model(NAME, num_classes=7, checkpoint=write(tmp_path / "cut.pth", without), **TINY)


def test_other_vits_are_refused_in_one_sentence(tmp_path):
    decoder = {
        key: value
        for key, value in mae().state_dict().items()
        if key.startswith(("decoder_", "mask_token"))
    }
    cases = {
        "holds the decoder of a masked autoencoder and no encoder": decoder,
        "decoder of a masked autoencoder and no encoder": hugging_face(decoder, "vit."),
        "patch size 4x4, and the network has 8x8": encoder_of(mae(image_size=16, patch_size=4)),
        "patch size 8x4, and the network has 8x8": hugging_face(
            mae(patch_size=(8, 4)).state_dict(), "vit."
        ),
        "width 32, and the network has 24": mae(dim=32).state_dict(),
        "depth 3, and the network has 2": encoder_of(mae(depth=3)),
        "width 12, and the network has 24": tiny(embed_dim=12).state_dict(),
        "holds nothing of vit_tiny_patch16_224: its tensors are called 'a', 'b', 'c', ...": {
            key: torch.ones(1) for key in "abcd"
        },
    }
    for sentence, state in cases.items():
        for name in ("w.safetensors", "w.pth"):
            path = write(tmp_path / name, state)
            for options in ({}, {"num_classes": 3}):
                with pytest.raises(DataError, match=re.escape(sentence)) as caught:
                    create_model(NAME, checkpoint=path, **options, **TINY)
                assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_positions_of_an_autoencoder_of_another_image_size_are_resampled(tmp_path, caplog):
    source = mae(1)
    path = write(tmp_path / "mae.pth", source.state_dict())
    teacher = create_model(NAME, checkpoint=path, **{**TINY, "image_size": (48, 32)})
    assert "; its positions were resampled from 4 x 4 patches to 6 x 4; " in caplog.messages[0]
    assert teacher.pos_embed.shape == (1, 25, 24) and torch.equal(
        teacher.pos_embed[:, 0], source.pos_embed[:, 0]
    )
    assert torch.equal(teacher.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    assert features(teacher, torch.randn(1, 3, 48, 32)).shape == (1, 25, 24)


SPEC = InputSpec((32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear", 1.0)


def exported(
    folder: Path, architecture: str = NAME, classes: int = 0, **changes
) -> torch.nn.Module:
    """What a run writes; without classes: what a pre-training does."""
    torch.manual_seed(1)
    sizes = {
        "img_size": (32, 32),
        "patch_size": 8,
        "embed_dim": 24,
        "num_heads": 2,
        "depth": 2,
        **changes,
    }
    model = create_model(architecture, num_classes=classes, **sizes).eval()
    names = [f"c{i}" for i in range(classes)] or None
    export_timm(
        model,
        folder,
        architecture=architecture,
        model_args=sizes,
        classes=names,
        input_spec=replace(SPEC, image_size=sizes["img_size"]),
    )
    return model


@pytest.mark.parametrize("num_classes", [None, 0, 7])
@pytest.mark.parametrize("pool", [None, "avg"])
def test_a_folder_without_classes_starts_a_student(tmp_path, caplog, num_classes, pool):
    source = exported(tmp_path / "pretrained").state_dict()
    student = create_model(
        str(tmp_path / "pretrained"), num_classes=num_classes, global_pool=pool, drop_path=0.1
    )
    kept = {key: value for key, value in source.items() if not (pool and key.startswith("norm."))}
    state = student.state_dict()
    fresh = (["fc_norm.weight", "fc_norm.bias"] if pool else []) + (
        ["head.weight", "head.bias"] if num_classes else []
    )
    assert state.keys() - kept.keys() == set(fresh) and equal(
        {key: state[key] for key in kept}, kept
    )
    assert student.num_classes == (num_classes or 0) and student.global_pool == (pool or "token")
    assert (f"has no classifier: {', '.join(fresh)} start fresh" in caplog.text) == bool(fresh)
    assert class_names(student) is None
    torch.manual_seed(2)
    again = create_model(
        str(tmp_path / "pretrained"), num_classes=num_classes, global_pool=pool, image_size=64
    )
    assert again.pos_embed.shape == (1, 65, 24) and torch.equal(
        again.patch_embed.proj.weight, student.patch_embed.proj.weight
    )


def test_a_distilled_folder_without_classes_has_both_heads_fresh(tmp_path, caplog):
    source = exported(tmp_path / "pretrained", "deit_tiny_distilled_patch16_224").state_dict()
    student = create_model(str(tmp_path / "pretrained"), num_classes=7)
    assert student.head_dist.weight.shape == (7, 24) and equal(
        {key: student.state_dict()[key] for key in source}, source
    )
    assert "head.weight, head.bias, head_dist.weight, head_dist.bias start fresh" in caplog.text


def test_a_folder_without_classes_but_with_its_own_mean_norm_keeps_it(tmp_path):
    source = exported(tmp_path / "pretrained", global_pool="avg")
    with torch.no_grad():
        source.fc_norm.weight.fill_(3)
    export_timm(
        source,
        tmp_path / "again",
        architecture=NAME,
        model_args={
            "patch_size": 8,
            "embed_dim": 24,
            "num_heads": 2,
            "depth": 2,
            "global_pool": "avg",
        },
        classes=None,
        input_spec=SPEC,
    )
    student = create_model(str(tmp_path / "again"), num_classes=7)
    assert (student.fc_norm.weight == 3).all() and student.head.weight.shape == (7, 24)
    with pytest.raises(DataError, match=r"norms its features after pooling \(fc_norm\)"):
        create_model(str(tmp_path / "again"), num_classes=7, global_pool="token")


def test_convolutional_folders_without_classes_get_a_head_from_timm(tmp_path):
    torch.manual_seed(0)
    model = create_model("resnet18", num_classes=0).eval()
    export_timm(
        model,
        tmp_path / "cnn",
        architecture="resnet18",
        model_args={},
        classes=None,
        input_spec=SPEC,
    )
    student = create_model(str(tmp_path / "cnn"), num_classes=3)
    assert student.fc.weight.shape == (3, 512) and torch.equal(
        student.conv1.weight, model.conv1.weight
    )


# -- positions on another grid --------------------------------------------------------------------


def cubic_weights(many: int, few: int) -> np.ndarray:
    """``(few, many)``: how places weigh on others along one axis, bicubic (Keys, a = -0.5) and
    antialiased, by its definition.
    """
    scale = many / few
    stretch = max(scale, 1.0)
    rows = np.zeros((few, many))
    for i in range(few):
        centre = (i + 0.5) * scale
        for j in range(
            max(int(centre - 2 * stretch + 0.5), 0), min(int(centre + 2 * stretch + 0.5), many)
        ):
            x = abs(j + 0.5 - centre) / stretch
            rows[i, j] = (
                1.5 * x**3 - 2.5 * x**2 + 1
                if x < 1
                else max(2 - x, 0) * (x - 1) * (x - 2) * 0.5
                if x < 2
                else 0
            )
    return rows / rows.sum(1, keepdims=True)


def resampled(table: torch.Tensor, its: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """A table of positions with a class token's, moved from one grid to another by hand, in
    float64.
    """
    patches = table[0, 1:].double().numpy().reshape(*its, -1)
    moved = np.einsum(
        "ai,bj,ijd->abd", cubic_weights(its[0], grid[0]), cubic_weights(its[1], grid[1]), patches
    )
    return torch.cat(
        [table[:, :1].double(), torch.from_numpy(moved.reshape(1, grid[0] * grid[1], -1))], dim=1
    )


MOVES = {
    "as many patches on another grid": ((32, 32), (16, 64)),
    "as many patches on a square": ((16, 64), (32, 32)),
    "as many patches, turned": ((16, 32), (32, 16)),
    "from a square number that is no square": ((16, 64), (24, 72)),
    "from a number that is no square": ((16, 32), (32, 32)),
    "from no square to no square": ((24, 16), (32, 40)),
    "from a square": ((32, 32), (64, 64)),
    "to fewer": ((64, 32), (16, 24)),
}


@pytest.mark.parametrize("num_classes", [None, 7])
@pytest.mark.parametrize("saved_classes", [0, 5])
@pytest.mark.parametrize("move", MOVES)
def test_positions_of_a_folder_lie_where_its_images_were(
    tmp_path, caplog, move, saved_classes, num_classes
):
    """Fails without the grid of config.json (`_grid_of`), and on timm 1.0.20 also where timm's own
    resampling is trusted.
    """
    trained, built = MOVES[move]
    source = exported(tmp_path / "run", classes=saved_classes, img_size=trained)
    model = create_model(str(tmp_path / "run"), num_classes=num_classes, image_size=built)
    its, grid = ((height // 8, width // 8) for height, width in (trained, built))
    assert torch.allclose(
        model.pos_embed.double(), resampled(source.pos_embed.detach(), its, grid), atol=1e-5
    )
    assert (
        f"its positions were resampled from {its[0]} x {its[1]} patches to {grid[0]} x {grid[1]}"
        in caplog.text
    )
    assert len(caplog.messages) == 1 and torch.equal(
        model.blocks[1].mlp.fc2.weight, source.blocks[1].mlp.fc2.weight
    )
    assert model.num_classes == (
        saved_classes if num_classes is None else 7
    ) and model.pretrained_cfg["input_size"] == (3, *built)


@pytest.mark.parametrize("size", [(32, 32), (16, 64), (16, 32)])
def test_a_folder_keeps_its_positions_at_its_own_size(tmp_path, caplog, size):
    source = exported(tmp_path / "run", img_size=size)
    for options in ({}, {"image_size": size}):
        assert torch.equal(
            create_model(str(tmp_path / "run"), **options).pos_embed, source.pos_embed
        )
    assert not caplog.messages


def test_a_file_alone_is_of_square_images_or_of_the_networks(tmp_path):
    square = write(tmp_path / "square.safetensors", tiny(1, num_classes=0).state_dict())
    wide = write(
        tmp_path / "wide.safetensors", tiny(1, num_classes=0, image_size=(16, 64)).state_dict()
    )
    twice = tiny(1, num_classes=0, image_size=(16, 32))
    oblong = write(tmp_path / "oblong.safetensors", twice.state_dict())
    moved = create_model(NAME, checkpoint=square, **{**TINY, "image_size": (48, 32)})
    assert torch.allclose(
        moved.pos_embed.double(),
        resampled(tiny(1, num_classes=0).pos_embed.detach(), (4, 4), (6, 4)),
        atol=1e-5,
    )
    assert torch.equal(
        create_model(NAME, checkpoint=oblong, **{**TINY, "image_size": (16, 32)}).pos_embed,
        twice.pos_embed,
    )
    refusals = {
        (
            square,
            (16, 64),
        ): r"its 16 patches lie, and the network has 2 x 8",
        (wide, (16, 64)): r"its 16 patches lie",
        (oblong, (32, 32)): r"its 8 patches lie, and the network has 4 x 4",
        (oblong, (32, 64)): r"its 8 patches lie",
    }
    for (path, size), sentence in refusals.items():
        for options in ({}, {"num_classes": 3}):
            with pytest.raises(DataError, match=sentence) as caught:
                create_model(NAME, checkpoint=path, **options, **{**TINY, "image_size": size})
            assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


# -- normalisation --------------------------------------------------------------------------------


def test_a_masked_autoencoders_file_brings_imagenets_normalisation_under_a_plain_name(
    tmp_path, caplog
):
    """Fails without the call of `_normalisation`; a name or a folder that says a normalisation
    keeps it.
    """
    full, alone = (
        write(tmp_path / f"{name}.safetensors", state)
        for name, state in (("full", mae(1).state_dict()), ("alone", encoder_of(mae(1))))
    )
    imagenet = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)

    def fed(name: str, path: Path, **options) -> tuple[tuple[float, ...], tuple[float, ...]]:
        caplog.clear()
        spec = input_spec_of(create_model(name, checkpoint=path, **options))
        return spec.mean, spec.std

    for name in ("vit_base_patch16_224.mae", "deit_tiny_patch16_224"):
        for path in (full, alone):
            assert fed(name, path, **TINY) == imagenet and "normalised" not in caplog.text
    assert fed("vit_base_patch16_224", full, num_classes=3, **TINY) == imagenet
    assert fed("vit_base_patch16_224", alone, num_classes=3, **TINY) == ((0.5,) * 3, (0.5,) * 3)
    assert caplog.text.count("images are normalised as for vit_base_patch16_224") == 1
    exported(tmp_path / "run")
    for path in (full, alone):
        assert (
            fed(str(tmp_path / "run"), path) == (SPEC.mean, SPEC.std)
            and "normalised" not in caplog.text
        )
    whole = write(tmp_path / "whole.safetensors", tiny(1).state_dict())
    assert fed(NAME, whole, **TINY) == ((0.5,) * 3, (0.5,) * 3) and not caplog.messages


# -- files that are not weights -------------------------------------------------------------------


def test_files_that_are_no_weights_are_one_sentence(tmp_path):
    cases: dict[str, tuple[bytes, str]] = {
        "empty.pth": (b"", "is empty"),
        "empty.safetensors": (b"", "is empty"),
        "page.pth": (b"\n<!DOCTYPE html><html>404</html>", "web page"),
        "page.safetensors": (b"<html>", "web page"),
        "pointer.bin": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        "noise.pth": (random.Random(0).randbytes(3000), "no weights file"),
        "noise.safetensors": (random.Random(0).randbytes(3000), "no weights file"),
        "weights.npz": (b"PK\x03\x04", "convert to .safetensors"),
        "list.pth": (torch_bytes([torch.ones(1)]), "holds no weights"),
        "numbers.pth": (torch_bytes({"a": 1}), "holds no weights"),
        "nothing.pth": (torch_bytes({}), "holds no weights"),
        "huge-header.safetensors": (
            (2**62).to_bytes(8, "little") + b"{}",
            "no weights file",
        ),
        "overlap.safetensors": (
            header(
                {
                    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                    "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
                },
                12,
            ),
            "no weights file",
        ),
        "wrong-shape.safetensors": (
            header({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}}, 8),
            "no weights file",
        ),
    }
    for name, (content, sentence) in cases.items():
        (tmp_path / name).write_bytes(content)
        assert sentence in refused(tmp_path / name), name
    assert "no weights file" in refused(tmp_path / "missing.pth")
    (tmp_path / "dir.pth").mkdir()
    assert "is a folder" in refused(tmp_path / "dir.pth")


def header(entries: dict, size: int) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_every_cut_is_refused_in_one_sentence(tmp_path, kind):
    state = {"a": torch.randn(50), "b": torch.randn(3, 3)}
    if kind == "safetensors":
        data, path = safetensors.torch.save(state), tmp_path / "w.safetensors"
    else:
        data, path = (
            torch_bytes(state, _use_new_zipfile_serialization=kind == "zip"),
            tmp_path / "w.pth",
        )
    rng = random.Random(kind)
    for cut in [1, 7, 8, 9, 20, len(data) - 1, *(rng.randrange(1, len(data)) for _ in range(80))]:
        path.write_bytes(data[:cut])
        refused(path)


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self):
        return (os.system, (f"touch {shlex.quote(self.canary)}",))


def malicious(folder: Path, canary: Path) -> list[Path]:
    payload = Payload(canary)
    files = {
        "a.pth": torch_bytes({"model": {"w": torch.ones(1)}, "args": payload}),
        "b.pt": torch_bytes(payload),
        "c.bin": torch_bytes({"w": payload}, _use_new_zipfile_serialization=False),
        "d.tar": pickle.dumps(payload),
        "e.pth": pickle.dumps({"w": payload}, protocol=0),
        "f.safetensors": torch_bytes(payload),
        "g.safetensors": pickle.dumps(payload),
    }
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("archive/data.pkl", pickle.dumps(payload))
        zipped.writestr("archive/version", "3\n")
    files["h.pth"] = archive.getvalue()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


def test_a_pickle_is_never_executed(tmp_path):
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(Payload(canary)))
    assert canary.exists(), "the payload works"
    canary.unlink()
    for path in malicious(tmp_path, canary):
        refused(path)
        with pytest.raises(UserError):
            create_model(NAME, checkpoint=path)
        folder = tmp_path / f"folder-{path.name}"
        folder.mkdir()
        (folder / "config.json").write_text(
            json.dumps({"architecture": NAME, "pretrained_cfg": {}})
        )
        (
            folder / ("model.safetensors" if path.suffix == ".safetensors" else "pytorch_model.bin")
        ).write_bytes(path.read_bytes())
        for name in (str(folder), f"local-dir:{folder}"):
            for num_classes in (None, 3):
                with pytest.raises(UserError):
                    create_model(name, num_classes=num_classes)
    assert not canary.exists()


def test_a_pickle_is_named_and_the_conversion_told(tmp_path):
    path = tmp_path / "deit.pth"
    path.write_bytes(torch_bytes({"model": {"w": torch.ones(1)}, "args": argparse.Namespace(lr=1)}))
    sentence = refused(path)
    assert (
        "argparse.Namespace" in sentence
        and "not executed" in sentence
        and "convert it: python -c" in sentence
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), buffer)
    (tmp_path / "script.pt").write_bytes(buffer.getvalue())
    assert "TorchScript" in refused(tmp_path / "script.pt")


# -- classes --------------------------------------------------------------------------------------


def test_class_names():
    assert class_names(create_model(NAME))[:2] == ("n01440764", "n01443537")
    assert class_names(tiny()) is None
    assert class_names(create_model("vit_tiny_patch16_224.augreg_in21k", num_classes=1000)) is None
    named = tiny()
    named.pretrained_cfg["label_names"] = list("abcde")
    assert class_names(named) == tuple("abcde")
    named.pretrained_cfg["label_names"] = list("abc")
    assert class_names(named) is None
    assert class_names(torch.nn.Linear(2, 2)) is None
