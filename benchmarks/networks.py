"""Which claims hold for timm's networks: each claim on each network, random weights, small images.

    python benchmarks/networks.py                  # all of them
    python benchmarks/networks.py convnext eva02   # those whose name contains one of these
    python benchmarks/networks.py --part 1/2       # every second one, from the first

For each: whether it is walked or run whole; whether `run_vit` equals ``model(images)``, with all
patches in another order too, and with half of them timm's own forward pass on those; what it
records (class token, hidden states, attention); whether its FLOPs are counted; whether a copy and a
reloaded export answer the same. Then every role, as teacher / as student, by one real step with a
small ViT. A cell is ``yes``, the largest difference relative to the largest answer, or the number
of the refusal below the table; anything else is a fault, as is a refusal that names no way out.
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
from timm.models.beit import Beit
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from vitdistill import Distiller
from vitdistill.data.model_input import input_spec_of
from vitdistill.errors import Set, UserError
from vitdistill.methods.dmae import DMAE
from vitdistill.methods.mae import PixelReconstruction
from vitdistill.methods.maskedkd import MaskedKD
from vitdistill.vit import Needs, Network, family_of, run_vit
from vitdistill.vit.copies import copy_network
from vitdistill.vit.flops import forward_flops
from vitdistill.weights.create import create_model
from vitdistill.weights.export import export_timm

MAX_PARAMETERS = 150e6
SMALL: dict[str, Any] = {"embed_dim": 48, "depth": 3, "num_heads": 3}
"""For ViTs; the others are as timm has them."""

FAMILIES = ("eva", "beit", "naflexvit")
"""Modules of timm of which every name is measured."""

VITS = """
vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224 flexivit_small
vit_small_patch14_reg4_dinov2 vit_little_patch16_reg4_gap_256 vit_medium_patch16_gap_240
vit_base_patch16_siglip_224 vit_base_patch16_clip_224 aimv2_large_patch14_224
vit_base_patch16_rpn_224 cait_xxs24_224 xcit_nano_12_p16_224 vit_relpos_small_patch16_224
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

ROLES: dict[str, dict[str, Any]] = {
    "kd": {"objectives": ["ce", "kd"]},
    "tokens": {"objectives": ["ce", "tokens"]},
    "vitkd": {"objectives": ["ce", "vitkd"]},
    "relations": {"objectives": ["ce", "relations"]},
    "maskedkd": {"objectives": ["ce", "kd"], "selector": MaskedKD()},
    "dmae": {
        "objectives": {
            "mae": PixelReconstruction(decoder_dim=24, decoder_depth=2, decoder_num_heads=2),
            "dmae": DMAE(any_teacher=True),
        },
        "masking": "random_masking",
    },
}

Row = dict[str, str]
COLUMNS = (
    *("network", "class", "run", "equal", "permuted", "half", "records", "flops", "copy"),
    *("export", *ROLES),
)


class Refusals:
    """The sentences that refuse something, each kind of them once, by number."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def number(self, error: UserError, network: str) -> str:
        if not any(error.fixes):
            return f"FAULT: no way out of: {said(error)}"
        kind = error.what.replace(network, "it")
        self.found.setdefault(kind, str(error))
        return f"({[*self.found].index(kind) + 1})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of names; none: all networks")
    parser.add_argument("--part", default="1/1", help="every so many-th network")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    first, step_by = map(int, args.part.split("/"))
    vits = {name for family in FAMILIES for name in timm.list_models(module=family)} | {*VITS}
    wanted = [
        n for n in (*sorted(vits), *OTHERS) if not args.names or any(p in n for p in args.names)
    ]
    known = {*timm.list_models()}
    print("# What is true of timm's networks\n")
    print(describe_machine("networks.py"))
    print("\n| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    rows, refusals = [], Refusals()
    for name in wanted[first - 1 :: step_by]:
        if name in known:
            rows.append(measure(name, SMALL if name in vits else {}, refusals))
            print("| " + " | ".join(rows[-1][column] for column in COLUMNS) + " |", flush=True)
    faults = [row for row in rows if any("FAULT" in cell for cell in row.values())]
    kinds = len({row["class"] for row in rows})
    print(f"\n{len(rows)} networks of {kinds} classes; with a fault: {len(faults)}\n")
    for i, sentence in enumerate(refusals.found.values(), 1):
        print(f"{i}. {sentence}")
    absent = [name for name in wanted if name not in known]
    if absent:
        print(f"\nThis timm has no {', '.join(absent)}.")


def measure(name: str, args: dict[str, Any], refusals: Refusals) -> Row:
    """Return the row of one network."""
    began = time.process_time()
    torch.manual_seed(0)
    row = dict.fromkeys(COLUMNS, "-") | {"network": name}

    def tried(claim: Callable[[], str]) -> str:
        try:
            return claim()
        except UserError as error:
            return refusals.number(error, name)
        except Exception as error:
            return f"FAULT: {said(error)}"

    try:
        model, args = build(name, args)
    except Exception as error:
        return row | {"class": f"FAULT: cannot be built: {said(error)}"}
    row["class"] = type(model).__name__
    if sum(p.numel() for p in model.parameters()) > MAX_PARAMETERS:
        return row | {"run": "left out: too big"}
    spec = input_spec_of(model)
    images = torch.randn(2, 3, *spec.image_size)
    # With gradients: LeViT and its kin then keep a history that a copy has to do without.
    whole = model(images).detach()
    network = family_of(model).network
    row["run"] = "walked" if network.walks else "whole"
    with torch.no_grad():
        row["equal"] = tried(lambda: difference(run_vit(model, images, Needs(True)).logits, whole))
        row["records"] = tried(lambda: records(model, images))
        if network.walks:
            rows, columns = family_of(model).grid(images)
            keep = torch.stack([torch.randperm(rows * columns) for _ in images])
            half = keep[:, : max(rows * columns // 2, 1)]
            row["permuted"] = tried(lambda: difference(answer(model, images, keep), whole))
    student = copy_network(model)
    with torch.no_grad():
        row["copy"] = tried(lambda: difference(student(images), whole))
        if network.walks:
            own = copy_network(model)
            row["half"] = tried(
                lambda: difference(answer(model, images, half), timms_own(own, images, half))
            )
    row["flops"] = tried(lambda: f"{forward_flops(model, spec.image_size):.2e}")
    row["export"] = tried(lambda: exported(model, name, args, images, whole))
    for role, asked in ROLES.items():
        beside = small(spec.image_size, network)
        as_student = dict(asked)
        if role == "maskedkd" and network.attention_source is None:
            as_student["selector"] = MaskedKD(saliency="energy")

        def teach() -> str:
            return step(beside, model, **asked)  # noqa: B023

        def learn() -> str:
            try:
                return step(student, beside, **as_student)  # noqa: B023
            except UserError as error:
                other = as_advised(error, name, args)
                if other is None:
                    raise
                return f"{refusals.number(error, name)}, then {step(other, beside, **as_student)}"  # noqa: B023

        taught, learned = tried(teach), tried(learn)
        row[role] = taught if taught == learned else f"{taught} / {learned}"
    print(f"{time.process_time() - began:5.1f} s  {name}", file=sys.stderr, flush=True)
    return row


def build(name: str, args: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Build it for images of 64 pixels, or of 56 in patches of 14, or for its own."""
    args = {**args, "num_classes": 7}
    if "xcit" in name:
        args["num_heads"] = 2
    if "sapiens2" in name:
        args |= {"embed_dim": 64, "num_heads": 4, "num_kv_heads": (None, 2, 2)}
    for side in [args["img_size"]] if "img_size" in args else (64, 56, 96, 128, None):
        sized = args if side is None else {**args, "img_size": side}
        try:
            model = create_model(name, **sized).eval()
            with torch.no_grad():  # layer scales of 1e-5 and heads of zeros hide what blocks do
                for parameter in model.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
                model(torch.zeros(1, 3, *input_spec_of(model).image_size))
            return model, sized
        except Exception:
            if side is None or "img_size" in args:
                raise
    raise AssertionError


def as_advised(error: UserError, name: str, args: dict[str, Any]) -> nn.Module | None:
    """Build the student with the argument that a refusal names as the way out, if any."""
    path = "student.model_args."
    for way in (fix for fix in error.fixes if isinstance(fix, Set) and fix.field.startswith(path)):
        setting = way.field.removeprefix(path)
        if setting == "fc_norm" and name in timm.list_models(module="eva"):
            setting = "use_fc_norm"  # as the refusal says
        return build(name, {**args, setting: way.value})[0]
    return None


def small(size: tuple[int, int], beside: Network) -> nn.Module:
    """Return a ViT of some thousand weights for the other side of a step."""
    patch = beside.patch_size if beside.walks else (size[0] // 8, size[1] // 8)
    args = {"img_size": size, "patch_size": patch, "embed_dim": 24, "depth": 3, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", num_classes=7, **args)


def answer(model: nn.Module, images: Tensor, keep: Tensor) -> Tensor:
    logits = run_vit(model, images, Needs(logits=True), keep).logits
    assert logits is not None
    return logits


class Chosen(nn.Module):
    """In place of timm's random dropping of patches: leaves those of ``keep``."""

    def __init__(self, keep: Tensor, prefix: int, indices: bool) -> None:
        super().__init__()
        self.keep, self.prefix, self.indices = keep, prefix, indices

    def forward(self, tokens: Tensor) -> Any:
        kept = tokens[:, self.prefix :].gather(
            1, self.keep[..., None].expand(-1, -1, tokens.shape[2])
        )
        tokens = torch.cat([tokens[:, : self.prefix], kept], dim=1)
        return (tokens, self.keep) if self.indices else tokens


class Hiding(nn.Module):
    """In place of timm's shared bias of attention: nobody attends to patches not in ``keep``."""

    def __init__(self, keep: Tensor, num_patches: int, shared: nn.Module | None) -> None:
        super().__init__()
        hidden = torch.full((len(keep), num_patches), -torch.inf).scatter(1, keep, 0.0)
        self.bias, self.shared = nn.functional.pad(hidden, (1, 0))[:, None, None], shared

    def forward(self) -> Tensor:
        length = self.bias.shape[-1]
        return self.bias.expand(-1, -1, length, -1) + (self.shared() if self.shared else 0)


def timms_own(model: Any, images: Tensor, keep: Tensor) -> Tensor:
    """Return the answer of timm's own forward pass on these patches of every image."""
    if isinstance(model, Beit):  # timm drops none of its patches
        num_patches = model.patch_embed.num_patches
        model.rel_pos_bias = Hiding(keep, num_patches, model.rel_pos_bias)
        kept = Chosen(keep, 1, False)(model.forward_features(images))
        return model.forward_head(kept)
    model.patch_drop = Chosen(keep, model.num_prefix_tokens, hasattr(model, "rope"))
    model.train(isinstance(model, NaFlexVit))  # which drops in training alone; nothing else does
    return model(images)


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


def step(student: nn.Module, teacher: nn.Module, **asked: Any) -> str:
    """Return whether one step of a distillation reaches the student's weights."""
    spec = input_spec_of(student)
    student.zero_grad()
    distiller = Distiller(student, teacher, images_spec=spec, **asked)
    loss = distiller.train()(torch.randn(2, 3, *spec.image_size), torch.tensor([0, 1]))["loss"]
    loss.backward()
    reached = any(p.grad is not None and p.grad.any() for p in student.parameters())
    return "yes" if loss.isfinite() and reached else "FAULT: nothing is learned"


def said(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return (name + (lines[0] if lines else "")).replace("|", "/")[:160]


if __name__ == "__main__":
    main()
