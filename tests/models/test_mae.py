"""The masked autoencoder: the authors' numbers, and what must hold for any image, patch and
encoder.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from published_mae import reconstruction_loss
from torch import Tensor, nn

from vitdistill.errors import ConfigError
from vitdistill.methods.masking import random_masking
from vitdistill.models.mae import (
    MAEDecoder,
    MaskedAutoencoder,
    hold_positions,
    init_mae,
    patchify,
    sincos_positions,
    unpatchify,
)
from vitdistill.vit.needs import Needs
from vitdistill.vit.walk import run_vit

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())

with np.load(GOLDEN / "dmae.npz") as data:
    DATA = {key: torch.from_numpy(data[key]) for key in data.files}

seeds = st.integers(0, 10**6)
sides = st.integers(1, 4)


def golden(who: str, dim: int, depth: int, num_heads: int) -> MaskedAutoencoder:
    """The authors' network in float64; ``load_state_dict`` is strict, so that its keys are ours."""
    model = MaskedAutoencoder(64, 16, dim, depth, num_heads, 32, 2, 4)
    own = {k.removeprefix(f"{who}."): v for k, v in DATA.items() if k.startswith(f"{who}.")}
    model.load_state_dict({k: v for k, v in own.items() if not k.startswith("aligned_")})
    return model.double()


def small(**changes) -> MaskedAutoencoder:
    torch.manual_seed(0)
    options = {"image_size": (12, 16), "patch_size": (6, 4), "dim": 8, "depth": 2, "num_heads": 2}
    return MaskedAutoencoder(
        **{**options, "decoder_dim": 12, "decoder_depth": 1, "decoder_num_heads": 3, **changes}
    )


# --- the authors' numbers ------------------------------------------------------------------------


@torch.no_grad()
def test_the_authors_reconstruction() -> None:
    model = golden("student", 48, 4, 3)
    prediction, mask = model(DATA["images"], DATA["noise"])
    loss = reconstruction_loss(prediction, DATA["images"], mask, (16, 16))
    assert prediction.shape == (3, 16, 768) and mask.sum(1).tolist() == [12, 12, 12]
    assert loss.item() == pytest.approx(EXPECTED["dmae reconstruction (float64)"], abs=1e-10)
    keep, _, _ = random_masking(DATA["noise"], 0.75)
    assert keep[0].tolist() == EXPECTED["dmae kept patches of image 0"]


def test_the_authors_position_tables() -> None:
    for who, dim in (("student", 48), ("teacher", 64)):
        assert torch.equal(sincos_positions(dim, (4, 4)), DATA[f"{who}.pos_embed"])
        assert torch.equal(sincos_positions(32, (4, 4)), DATA[f"{who}.decoder_pos_embed"])


# --- positions -----------------------------------------------------------------------------------


@given(quarter=st.integers(1, 8), rows=st.integers(1, 6), columns=st.integers(1, 6))
def test_positions_are_sines_and_cosines_of_column_then_row(
    quarter: int, rows: int, columns: int
) -> None:
    dim = 4 * quarter
    table = sincos_positions(dim, (rows, columns))
    assert table.shape == (1, 1 + rows * columns, dim) and table.dtype is torch.float32
    assert (table[0, 0] == 0).all()
    for row in range(rows):
        for column in range(columns):
            found = table[0, 1 + row * columns + column].tolist()
            expected = []
            for place in (column, row):
                angles = [place / 10000 ** (i / quarter) for i in range(quarter)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert found == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("dim", [0, 2, 6, 49, -4])
def test_a_width_that_does_not_divide_is_refused(dim: int) -> None:
    with pytest.raises(ConfigError, match=f"multiple of 4, and this one is {dim}$"):
        sincos_positions(dim, (2, 2))


# --- patches -------------------------------------------------------------------------------------


@given(seed=seeds, rows=sides, columns=sides, height=sides, width=sides, channels=st.integers(1, 3))
def test_patches_and_back(
    seed: int, rows: int, columns: int, height: int, width: int, channels: int
) -> None:
    torch.manual_seed(seed)
    images = torch.randn(2, channels, rows * height, columns * width)
    patches = patchify(images, (height, width))
    assert patches.shape == (2, rows * columns, height * width * channels)
    assert torch.equal(unpatchify(patches, (rows, columns), (height, width)), images)
    row, column, y, x, channel = rows - 1, columns // 2, height // 2, width - 1, channels - 1
    pixel = images[1, channel, row * height + y, column * width + x]
    assert patches[1, row * columns + column, (y * width + x) * channels + channel] == pixel


# --- the decoder ---------------------------------------------------------------------------------


def by_unshuffling(
    decoder: MAEDecoder | MaskedAutoencoder,
    features: Tensor,
    noise: Tensor,
    rate: float,
    prefix: int,
) -> Tensor:
    """The authors' order of things: mask tokens behind the visible ones, then all back in place by
    ``restore``.
    """
    keep, restore, _ = random_masking(noise, rate)
    tokens = decoder.decoder_embed(features)
    hidden = decoder.mask_token.expand(len(noise), noise.shape[1] - keep.shape[1], -1)
    shuffled = torch.cat([tokens[:, prefix:], hidden], dim=1)
    patches = torch.stack([row[order] for row, order in zip(shuffled, restore, strict=True)])
    zeros = decoder.decoder_pos_embed[:, :1].expand(-1, prefix, -1)
    tokens = torch.cat([tokens[:, :prefix], patches], dim=1) + torch.cat(
        [zeros, decoder.decoder_pos_embed[:, 1:]], dim=1
    )
    for block in decoder.decoder_blocks:
        tokens = block(tokens)
    return decoder.decoder_pred(decoder.decoder_norm(tokens))[:, prefix:]


@settings(max_examples=15)
@given(
    seed=seeds,
    rows=st.integers(1, 3),
    columns=st.integers(2, 4),
    prefix=st.integers(0, 3),
    depth=st.integers(0, 2),
)
@torch.no_grad()
def test_placing_equals_unshuffling(
    seed: int, rows: int, columns: int, prefix: int, depth: int
) -> None:
    torch.manual_seed(seed)
    noise = torch.rand(2, rows * columns)
    keep, _, _ = random_masking(noise, 0.5)
    features = torch.randn(2, prefix + keep.shape[1], 6)
    decoder = MAEDecoder(6, (rows, columns), (2, 3), 8, depth, 2)
    prediction = decoder(features, keep, prefix)
    assert prediction.shape == (2, rows * columns, 18)
    assert torch.allclose(
        prediction, by_unshuffling(decoder, features, noise, 0.5, prefix), atol=1e-5
    )


def test_the_decoder_starts_as_maes() -> None:
    torch.manual_seed(0)
    decoder = MAEDecoder(32, (4, 4), (8, 8), 64, 2, 4)
    check_initial(decoder)
    assert decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert not decoder.decoder_pos_embed.requires_grad


# --- the network ---------------------------------------------------------------------------------


def test_the_names_are_those_of_the_public_checkpoints() -> None:
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    blocks = ("blocks.0", "blocks.1", "decoder_blocks.0")
    modules = [f"{block}.{layer}" for block in blocks for layer in layers]
    modules += ["patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred"]
    held = {"pos_embed", "decoder_pos_embed"}
    expected = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    expected |= {"cls_token", "mask_token", *held}
    model = small()
    parameters = dict(model.named_parameters())
    assert set(model.state_dict()) == parameters.keys() == expected
    assert {name for name, p in parameters.items() if not p.requires_grad} == held
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


@settings(max_examples=10)
@given(seed=seeds, rate=st.sampled_from([0.0, 0.3, 0.5, 0.75]))
@torch.no_grad()
def test_only_visible_patches_are_read(seed: int, rate: float) -> None:
    """Hidden pixels change nothing, and the encoder is the plain ViT on the visible patches, then
    the authors' decoder.
    """
    model = small().eval()
    torch.manual_seed(seed)
    images, noise = torch.randn(2, 3, 12, 16), torch.rand(2, 8)
    prediction, mask = model(images, noise, rate)
    noisy = unpatchify(patchify(images, (6, 4)) + 9 * mask[:, :, None], (2, 4), (6, 4))
    again, _ = model(noisy, noise, rate)
    assert torch.equal(again, prediction)
    size = {"img_size": (12, 16), "patch_size": (6, 4)}
    shape = {"embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 0}
    plain = timm.create_model("vit_tiny_patch16_224", **size, **shape)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    keep, _, _ = random_masking(noise, rate)
    features = run_vit(plain.eval(), images, Needs(features=True), keep).features
    assert torch.allclose(prediction, by_unshuffling(model, features, noise, rate, 1), atol=1e-5)


# --- initialisation ------------------------------------------------------------------------------


def check_initial(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            bound = math.sqrt(6 / (module.in_features + module.out_features))
            assert module.weight.abs().max() <= bound
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)
            assert module.bias is None or (module.bias == 0).all()
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and (module.bias == 0).all()


@pytest.mark.parametrize(
    ("name", "options", "prefix"),
    [
        ("vit_tiny_patch16_224", {}, 1),
        ("deit_tiny_distilled_patch16_224", {}, 2),
        ("vit_tiny_patch16_224", {"reg_tokens": 3}, 4),
        ("vit_tiny_patch16_224", {"reg_tokens": 3, "no_embed_class": True}, 0),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, 0),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True, "num_classes": 0}, 1),
    ],
)
@torch.no_grad()
def test_any_plain_vit_starts_as_maes(name: str, options: dict[str, object], prefix: int) -> None:
    shape = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = timm.create_model(name, **{**shape, **options})
    for parameter in model.parameters():
        parameter.fill_(7)
    torch.manual_seed(0)
    init_mae(model)
    check_initial(model)
    weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
    bound = math.sqrt(6 / (32 + 192))
    assert 0.95 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert 0 < bias.abs().max() <= 1 / math.sqrt(192) and bias.std() > 0.02
    for token in (model.cls_token, getattr(model, "dist_token", None), model.reg_token):
        assert token is None or 0.01 < token.std() < 0.03
    assert model.pos_embed is not None and not model.pos_embed.requires_grad
    assert (model.pos_embed[:, :prefix] == 0).all()
    assert torch.equal(model.pos_embed[:, prefix:], sincos_positions(32, (4, 6))[:, 1:])


def test_a_bias_by_relative_position_is_learned() -> None:
    shape = {"img_size": 32, "embed_dim": 12, "depth": 1, "num_heads": 2}
    model: Any = timm.create_model("beit_base_patch16_224", **shape)
    for change in (init_mae, hold_positions):
        change(model)
        assert all(p.requires_grad for p in model.parameters())
    assert not model.blocks[0].attn.relative_position_bias_table.any()


def test_a_table_of_any_grid_is_filled_and_held() -> None:
    args = {"embed_dim": 12, "depth": 1, "num_heads": 2, "pos_embed_grid_size": (3, 5)}
    model: Any = timm.create_model("naflexvit_base_patch16_gap", **args)
    init_mae(model)
    held = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert held == ["embeds.pos_embed"]
    assert torch.equal(model.embeds.pos_embed.flatten(1, 2), sincos_positions(12, (3, 5))[:, 1:])
    assert model.embeds.reg_token.std() > 0.01


@pytest.mark.parametrize("positions", ["learn", "none"])
def test_positions_are_held_as_they_are(positions: str) -> None:
    shape = {"img_size": 32, "embed_dim": 12, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", **shape, pos_embed=positions)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if positions == "learn":
        hold_positions(model)
        held = [name for name, p in model.named_parameters() if not p.requires_grad]
        assert held == ["pos_embed"]
    else:
        for change in (init_mae, hold_positions):
            with pytest.raises(ConfigError) as caught:
                change(model)
            assert caught.value.field == "student.model"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
