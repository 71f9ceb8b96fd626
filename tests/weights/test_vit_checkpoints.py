"""Files of plain ViTs, masked autoencoders and Hugging Face: each ends as the same network."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import checkpoint_filter_fn

from vitdistill.data.augment import InputSpec
from vitdistill.data.model_input import input_spec_of
from vitdistill.errors import DataError
from vitdistill.models.mae import MaskedAutoencoder
from vitdistill.vit.needs import Needs
from vitdistill.vit.walk import run_vit
from vitdistill.weights.create import class_names, create_model
from vitdistill.weights.export import export_timm
from vitdistill.weights.files import load_state_dict
from vitdistill.weights.load import load_into
from vitdistill.weights.vit_checkpoints import Target

TINY = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2}
NAME = "vit_tiny_patch16_224"


def tiny(seed: int = 0, **changes) -> torch.nn.Module:
    torch.manual_seed(seed)
    return create_model(NAME, **{"num_classes": 5, **TINY, **changes}).eval()


def load_weights(model: torch.nn.Module, path: Path) -> None:
    load_into(Target(model, str(path)), load_state_dict(path))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


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
        r"1 key of another shape": {**state, "norm.weight": torch.tensor(1.0)},
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


def test_patches_of_another_size_go_through_timms_converter(tmp_path, caplog):
    source, model = tiny(1), tiny(2, patch_size=4)
    load_weights(model, write(tmp_path / "w.safetensors", source.state_dict()))
    assert f"timm's converter for {NAME} was applied" in caplog.text
    assert "resampled from 4 x 4 patches to 8 x 8" in caplog.text
    assert torch.equal(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    assert torch.equal(
        model.pos_embed, checkpoint_filter_fn(dict(source.state_dict()), model)["pos_embed"]
    )


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
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
    names |= {"attn.proj": "attention.output.dense"}
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
    if path.suffix == ".safetensors":
        path.write_bytes(safetensors.torch.save(state))
    else:
        torch.save({"model": state}, path)
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
    assert equal(teacher.state_dict(), encoder_of(source))
    assert f"{DECODER + 1} tensors of its decoder" in caplog.text


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
    head = ["head.weight", "head.bias"] if num_classes else []
    fresh = ["fc_norm.weight", "fc_norm.bias", *head]
    assert state.keys() - kept.keys() == set(fresh)
    assert (state["fc_norm.weight"] == 1).all() and (state["fc_norm.bias"] == 0).all()
    assert (
        f"has no classifier: {', '.join(fresh)} start fresh; its final norm is not used"
        in caplog.text
    )


@pytest.mark.parametrize("num_classes", [0, 7])
def test_a_network_with_another_pool_leaves_the_attention_pool_out(tmp_path, caplog, num_classes):
    name = "vit_base_patch16_siglip_224"
    source = create_model(name, num_classes=0, **TINY).state_dict()
    path = write(tmp_path / "pooled.pth", source)
    options = {"checkpoint": path, **TINY}
    assert equal(create_model(name, num_classes=0, **options).state_dict(), source)
    assert "attention pool" not in caplog.text
    student = create_model(name, num_classes=num_classes, global_pool="avg", **options).state_dict()
    kept = {k: v for k, v in source.items() if not k.startswith(("attn_pool.", "norm."))}
    assert len(kept) < len(source) - 8 and equal({k: student[k] for k in kept}, kept)
    assert "attention pool" in caplog.text


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
        DataError, match=r"2 keys missing \('fc_norm.weight', 'fc_norm.bias'\); 2 keys unexpected"
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


SPEC = InputSpec((32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear", 1.0)


def exported(
    folder: Path, architecture: str = NAME, classes: int = 0, **changes
) -> torch.nn.Module:
    """What a run writes; without classes: what a pre-training does."""
    torch.manual_seed(1)
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


@pytest.mark.parametrize("num_classes", [None, 0, 7])
@pytest.mark.parametrize("pool", [None, "avg"])
def test_a_folder_without_classes_starts_a_student(tmp_path, caplog, num_classes, pool):
    source = exported(tmp_path / "pretrained").state_dict()
    student = create_model(
        str(tmp_path / "pretrained"), num_classes=num_classes, global_pool=pool, drop_path=0.1
    )
    kept = {key: value for key, value in source.items() if not (pool and key.startswith("norm."))}
    state = student.state_dict()
    head = ["head.weight", "head.bias"] if num_classes else []
    fresh = [*(["fc_norm.weight", "fc_norm.bias"] if pool else []), *head]
    assert state.keys() - kept.keys() == set(fresh)
    assert equal({key: state[key] for key in kept}, kept)
    assert student.num_classes == (num_classes or 0) and student.global_pool == (pool or "token")
    assert (f"has no classifier: {', '.join(fresh)} start fresh" in caplog.text) == bool(fresh)
    assert class_names(student) is None
    torch.manual_seed(2)
    again = create_model(
        str(tmp_path / "pretrained"), num_classes=num_classes, global_pool=pool, image_size=64
    )
    assert again.pos_embed.shape == (1, 65, 24)
    assert torch.equal(again.patch_embed.proj.weight, student.patch_embed.proj.weight)


def test_a_distilled_folder_without_classes_has_both_heads_fresh(tmp_path, caplog):
    source = exported(tmp_path / "pretrained", "deit_tiny_distilled_patch16_224").state_dict()
    student = create_model(str(tmp_path / "pretrained"), num_classes=7)
    assert student.head_dist.weight.shape == (7, 24)
    assert equal({key: student.state_dict()[key] for key in source}, source)
    assert "head.weight, head.bias, head_dist.weight, head_dist.bias start fresh" in caplog.text


def test_a_folder_without_classes_but_with_its_own_mean_norm_keeps_it(tmp_path):
    source = exported(tmp_path / "run", global_pool="avg")
    torch.nn.init.constant_(source.fc_norm.weight, 3)
    args = {"patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2, "global_pool": "avg"}
    options = {"architecture": NAME, "model_args": args, "input_spec": SPEC}
    folder = str(export_timm(source, tmp_path / "again", classes=None, **options))
    student = create_model(folder, num_classes=7)
    assert (student.fc_norm.weight == 3).all() and student.head.weight.shape == (7, 24)
    with pytest.raises(DataError, match="fc_norm"):
        create_model(folder, num_classes=7, global_pool="token")


def cubic_weights(many: int, few: int) -> np.ndarray:
    """``(few, many)``: how places weigh on others along one axis, bicubic (Keys, a = -0.5) and
    antialiased, by its definition.
    """
    scale = many / few
    stretch = max(scale, 1.0)
    x = np.abs(np.arange(many) + 0.5 - (np.arange(few)[:, None] + 0.5) * scale) / stretch
    far = (2 - x).clip(0) * (x - 1) * (x - 2) * 0.5
    rows = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, far)
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


@pytest.mark.parametrize(("saved_classes", "num_classes"), [(0, 7), (5, None), (5, 7)])
@pytest.mark.parametrize("move", MOVES)
def test_positions_of_a_folder_lie_where_its_images_were(
    tmp_path, caplog, move, saved_classes, num_classes
):
    """Fails without the grid of config.json (`_grid_of`)."""
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
    assert len(caplog.messages) == 1
    assert torch.equal(model.blocks[1].mlp.fc2.weight, source.blocks[1].mlp.fc2.weight)
    assert model.num_classes == (saved_classes if num_classes is None else 7)
    assert model.pretrained_cfg["input_size"] == (3, *built)


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
        (square, (16, 64)): r"its 16 patches lie, and the network has 2 x 8",
        (wide, (16, 64)): r"its 16 patches lie",
        (oblong, (32, 32)): r"its 8 patches lie, and the network has 4 x 4",
        (oblong, (32, 64)): r"its 8 patches lie",
    }
    for (path, size), sentence in refusals.items():
        for options in ({}, {"num_classes": 3}):
            with pytest.raises(DataError, match=sentence) as caught:
                create_model(NAME, checkpoint=path, **options, **{**TINY, "image_size": size})
            assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


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
        assert fed(str(tmp_path / "run"), path) == (SPEC.mean, SPEC.std)
        assert "normalised" not in caplog.text
    whole = write(tmp_path / "whole.safetensors", tiny(1).state_dict())
    assert fed(NAME, whole, **TINY) == ((0.5,) * 3, (0.5,) * 3) and not caplog.messages
