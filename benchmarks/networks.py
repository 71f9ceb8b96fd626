"""What is true of timm's networks here: every claim on every network, random weights, small images.

    python benchmarks/networks.py                  # all of them
    python benchmarks/networks.py convnext eva02   # those whose name has one of these
    python benchmarks/networks.py --part 1/2       # every second one, from the first

For each: whether it is walked or run whole, whether `run_vit` equals ``model(images)``; whether all
patches in another order do, and half of them in another order equal half of them; what it records
(class token, hidden states, attention); whether its FLOPs are counted, a copy of it answers the
same, an export reloaded answers the same, and one step of CE and KD teaches it and one of `tokens`
learns from it. A cell is ``yes``, the largest difference relative to the largest answer, or the
sentence that refuses it; anything else is a fault.
"""

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import timm
import torch
from step_cost import describe_machine
from torch import Tensor, nn

from vitdistill import Distiller
from vitdistill.data.model_input import input_spec_of
from vitdistill.errors import UserError
from vitdistill.methods.tokens import TokenFeatures
from vitdistill.vit import Needs, family_of, run_vit
from vitdistill.vit.copies import copy_network
from vitdistill.vit.flops import forward_flops
from vitdistill.weights.create import create_model
from vitdistill.weights.export import export_timm

MAX_PARAMETERS = 150e6
SMALL: dict[str, Any] = {"embed_dim": 48, "depth": 3, "num_heads": 3}
"""Of ViTs; the others are as timm has them."""

VITS = """
vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224 flexivit_small
vit_small_patch14_reg4_dinov2 vit_little_patch16_reg4_gap_256 vit_medium_patch16_gap_240
vit_base_patch16_siglip_224 vit_base_patch16_clip_224 aimv2_large_patch14_224
vit_base_patch16_rpn_224 vit_small_patch16_dinov3 vit_small_plus_patch16_dinov3
eva02_tiny_patch14_224 eva02_base_patch16_clip_224 eva_giant_patch14_224
vit_pe_core_tiny_patch16_384 vit_pe_spatial_tiny_patch16_512 vit_small_patch16_rope_mixed_224
vit_small_patch16_rope_ape_224 vit_medium_patch16_rope_reg1_gap_256 beit_base_patch16_224
beitv2_large_patch16_224 naflexvit_base_patch16_gap naflexvit_base_patch16_parfac_gap
naflexvit_base_patch16_siglip naflexvit_so150m2_patch16_reg1_map naflexvit_base_patch16_radio_v3
cait_xxs24_224 xcit_nano_12_p16_224 vit_relpos_small_patch16_224
vit_relpos_medium_patch16_cls_224 samvit_base_patch16_224
""".split()  # noqa: SIM905
OTHERS = """
convit_tiny volo_d1_224 crossvit_tiny_240 pit_ti_224 pit_ti_distilled_224 tnt_s_patch16_224
mvitv2_tiny coat_lite_tiny levit_128s levit_conv_128s hiera_tiny_224 sam2_hiera_tiny
swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 vitamin_small_224
vit_small_r26_s32_224 mixer_s32_224 gmlp_ti16_224 resmlp_12_224 nest_tiny jx_nest_tiny
tiny_vit_5m_224 efficientformer_l1 efficientformerv2_s0 efficientvit_m0 efficientvit_b0
convnext_atto convnextv2_atto resnet10t resnet18 resnetv2_18 mobilenetv2_035
mobilenetv4_conv_small mobilenetv4_hybrid_medium mobilenetv3_small_050 efficientnet_lite0
repvit_m0_9 fastvit_t8 edgenext_xx_small mobilevit_xxs mobilevitv2_050 coatnet_pico_rw_224
maxvit_pico_rw_256 davit_tiny focalnet_tiny_srf gcvit_xxtiny twins_pcpvt_small pvt_v2_b0
poolformer_s12 caformer_s18 mambaout_femto inception_next_atto starnet_s1 shvit_s1
swiftformer_xs regnetx_002 densenet121 dla34 dpn48b ghostnet_050 hrnet_w18_small vgg11 rexnet_100
seresnet18 nf_resnet26 tresnet_m csatv2 xception41 inception_v3 sequencer2d_s visformer_tiny
convmixer_768_32 res2net50_14w_8s rdnet_tiny nextvit_small iformer_t lowformer_b0 efficientvim_m1
hgnetv2_b0 fasternet_t0 selecsls42 repghostnet_050 ese_vovnet19b_dw cs3darknet_s gernet_s
repvgg_a0 skresnet18 lcnet_035 hardcorenas_a halonet26t lambda_resnet26t gemma4_vit_167m
qwen3_vit_88m deepseek_vit_412m
""".split()  # noqa: SIM905

Row = dict[str, str]
COLUMNS = (
    *("network", "class", "run", "equal", "permuted", "half", "records", "flops", "copy"),
    *("export", "student", "teacher"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of names; none: all networks")
    parser.add_argument("--part", default="1/1", help="every so many-th network")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    first, step_by = map(int, args.part.split("/"))
    wanted = [n for n in (*VITS, *OTHERS) if not args.names or any(p in n for p in args.names)]
    known = set(timm.list_models())
    print("# What is true of timm's networks\n")
    print(describe_machine("networks.py"))
    print("\n| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    rows = []
    for name in wanted[first - 1 :: step_by]:
        if name in known:
            rows.append(measure(name))
            print("| " + " | ".join(rows[-1][column] for column in COLUMNS) + " |", flush=True)
    faults = [row for row in rows if any("FAULT" in cell for cell in row.values())]
    kinds = len({row["class"] for row in rows})
    print(f"\n{len(rows)} networks of {kinds} classes; with a fault: {len(faults)}")
    absent = [name for name in wanted if name not in known]
    if absent:
        print(f"This timm has no {', '.join(absent)}.")


def measure(name: str) -> Row:
    """Return the row of one network."""
    began = time.perf_counter()
    torch.manual_seed(0)
    row = dict.fromkeys(COLUMNS, "-")
    row["network"] = name
    args = {**SMALL} if name in VITS else {}
    if "xcit" in name:
        args["num_heads"] = 2
    try:
        model, args = build(name, args)
    except Exception as error:
        return row | {"class": f"FAULT: cannot be built: {said(error)}"}
    with torch.no_grad():  # layer scales of 1e-5 and heads of zeros hide what blocks do
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.eval()  # LeViT and its kin forget what they computed from the weights before
    row["class"] = type(model).__name__
    if sum(p.numel() for p in model.parameters()) > MAX_PARAMETERS:
        return row | {"run": "left out: too big"}
    spec = input_spec_of(model)
    images = torch.randn(2, 3, *spec.image_size)
    network = family_of(model).network
    row["run"] = "walked" if network.walks else "whole"
    with torch.no_grad():
        whole = model(images)
        row["equal"] = tried(lambda: difference(run_vit(model, images, Needs(True)).logits, whole))
        if network.walks:
            rows, columns = family_of(model).grid(images)
            keep = torch.stack([torch.randperm(rows * columns) for _ in images])
            some = keep[:, : max(rows * columns // 2, 1)]
            row["permuted"] = tried(lambda: difference(answer(model, images, keep), whole))
            row["half"] = tried(
                lambda: difference(answer(model, images, some.flip(1)), answer(model, images, some))
            )
        row["records"] = tried(lambda: records(model, images))
    row["copy"] = tried(lambda: difference(copied(model, images), whole))
    last = frozenset({-1})
    everything = Needs(True, last if network.dims else frozenset(), features=bool(network.dims))
    row["flops"] = tried(lambda: f"{forward_flops(model, spec.image_size, everything):.2e}")
    row["export"] = tried(lambda: exported(model, name, args, images, whole))
    row["student"] = tried(lambda: step(copy_network(model), small(spec.image_size), "ce", "kd"))
    row["teacher"] = tried(
        lambda: step(small(spec.image_size), model, TokenFeatures() if network.dims else "kd")
    )
    print(f"{time.perf_counter() - began:5.1f} s  {name}", file=sys.stderr, flush=True)
    return row


def build(name: str, args: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Build it for images of 64 pixels, or of 56 in patches of 14, or for its own."""
    args = {**args, "num_classes": 7}
    for side in (64, 56, 96, 128):
        try:
            model = create_model(name, image_size=side, **args).eval()
            with torch.no_grad():
                model(torch.zeros(1, 3, side, side))
            return model, {**args, "img_size": side}
        except Exception:
            continue
    return create_model(name, **args).eval(), args


def small(size: tuple[int, int]) -> nn.Module:
    """Return a ViT of some thousand weights for the other side of a step."""
    args = {"img_size": size, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    size_of_patch = 8 if all(side % 8 == 0 for side in size) else 14
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=7, **{**args, "patch_size": size_of_patch}
    )


def answer(model: nn.Module, images: Tensor, keep: Tensor) -> Tensor:
    logits = run_vit(model, images, Needs(logits=True), keep).logits
    assert logits is not None
    return logits


def difference(found: Any, expected: Any) -> str:
    off = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
    return "equal" if off == 0 else f"{off:.0e}" if off < 1e-5 else f"FAULT: {off:.0e}"


def records(model: nn.Module, images: Tensor) -> str:
    """Name what is recorded, after recording it."""
    network, found = family_of(model).network, []
    if network.dims:
        output = run_vit(model, images, Needs(hidden=frozenset({0, -1}), features=True))
        rows, columns = output.feature_patches.grid
        assert output.feature_patches.vectors.shape[1] == rows * columns
        found.append(f"{rows} x {columns}")
    if network.has_class_token:
        found.append("class token")
    registers = network.num_prefix_tokens - network.has_class_token
    if registers:
        found.append(f"{registers} more")
    if network.attention_source is not None:
        run_vit(model, images, Needs(attention=frozenset({-1})))
        found.append(f"attention ({network.attention_source})")
    return ", ".join(found) or "logits alone"


@torch.enable_grad()
def copied(model: nn.Module, images: Tensor) -> Tensor:
    """Return the answer of a copy made after a pass with gradients."""
    model(images)
    return copy_network(model)(images).detach()


def exported(
    model: nn.Module, name: str, args: dict[str, Any], images: Tensor, whole: Tensor
) -> str:
    with tempfile.TemporaryDirectory() as folder:
        spec = input_spec_of(model)
        given = {key: value for key, value in args.items() if key != "num_classes"}
        about = {"architecture": name, "model_args": given, "classes": None, "input_spec": spec}
        export_timm(model, folder, **about, prove=False)  # which is proved here
        again = create_model(folder).eval()
    with torch.no_grad():
        return difference(again(images), whole)


def step(student: nn.Module, teacher: nn.Module, *objectives: Any) -> str:
    distiller = Distiller(student, teacher, objectives, images_spec=input_spec_of(student))
    size = input_spec_of(student).image_size
    loss = distiller.train()(torch.randn(2, 3, *size), torch.tensor([0, 1]))["loss"]
    loss.backward()
    reached = any(p.grad is not None and p.grad.any() for p in student.parameters())
    return "yes" if loss.isfinite() and reached else "FAULT: nothing is learned"


def tried(claim: Callable[[], str]) -> str:
    try:
        return claim()
    except UserError as error:
        return said(error)
    except Exception as error:
        return f"FAULT: {said(error)}"


def said(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return (name + (lines[0] if lines else "")).replace("|", "/")[:160]


if __name__ == "__main__":
    main()
