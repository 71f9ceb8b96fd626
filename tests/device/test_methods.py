"""Every method and family on the device: as on the CPU in float32, near it in less."""

import copy
import gc
from collections.abc import Mapping

import pytest
import torch
import vit_forms
from method_cases import MASKINGS, OBJECTIVES, SELECTORS, Case, case_if_possible
from small_vits import WALKED, network, teacher_of, vit
from torch import Tensor

from vitdistill.data.batch import Batch
from vitdistill.distill.plan import make_plan
from vitdistill.distill.step import Distillation
from vitdistill.distill.teacher import Teacher
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.dmae import DMAE
from vitdistill.methods.kd import SoftKD
from vitdistill.methods.mae import PixelReconstruction
from vitdistill.methods.maskedkd import MaskedKD, TeacherGuided
from vitdistill.methods.masking import RandomMasking
from vitdistill.methods.nkd import NKD
from vitdistill.methods.vitkd import ViTKD
from vitdistill.runs.networks import compile_networks
from vitdistill.vit.needs import Needs
from vitdistill.vit.patches import resample_patches, top_patches
from vitdistill.vit.walk import run_vit

CPU = torch.device("cpu")
CASES = [(name, "whole", "alike") for name in OBJECTIVES]
CASES += [
    (name, "masked" if name in MASKINGS else "kept", "alike") for name in SELECTORS + MASKINGS
]
CASES += [("maskedkd", "kept", shapes) for shapes in ("unlike", *WALKED)]
CASES += [("vitkd", "kept", "unlike")]


def to(batch: Batch, device: torch.device) -> Batch:
    moved = {name: getattr(batch, name).to(device) for name in ("images", "labels", "ids", "views")}
    return Batch(**moved, view=batch.view, seed=batch.seed)


def step(
    case: Case, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Losses and gradients of one step, on the host."""
    module, teachers = copy.deepcopy(case.module).to(device).eval(), case.teachers
    for teacher in teachers.values():
        teacher.to(device)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        losses = module(to(case.batch, device), teachers)
    losses["loss"].backward()
    grads = {n: None if p.grad is None else p.grad.cpu() for n, p in module.named_parameters()}
    return {name: loss.detach().cpu() for name, loss in losses.items()}, grads


def length(grads: Mapping[str, Tensor | None]) -> Tensor:
    return torch.stack([g.norm() for g in grads.values() if g is not None]).norm()


@pytest.mark.parametrize(("name", "seen", "shapes"), CASES)
def test_one_step_of_a_method(device, name, seen, shapes):
    case = case_if_possible(name, seen=seen, shapes=shapes)
    losses, grads = step(case, CPU)
    others, their_grads = step(case, device)
    size = length(grads)
    for key, loss in losses.items():
        torch.testing.assert_close(others[key], loss, rtol=1e-4, atol=1e-5)
    for key, grad in grads.items():
        assert (their_grads[key] is None) == (grad is None), key
        if grad is not None:
            assert (their_grads[key] - grad).norm() <= 1e-3 * size, key
    precisions = [(torch.bfloat16, 0.1), (torch.float16, 0.03)]
    if name == "mae" and device == CPU:  # whose decoder takes a minute in float16
        precisions.pop()
    for dtype, within in precisions:
        half, half_grads = step(case, device, dtype)
        assert half["loss"].dtype == torch.float32 and half["loss"].isfinite()
        # Patches of nearly equal attention may change places.
        near = within if name not in SELECTORS else 0.3
        assert abs(half["loss"] - losses["loss"]) <= near * abs(losses["loss"]) + 0.02
        found = {key for key, grad in half_grads.items() if grad is not None}
        assert found == {key for key, grad in grads.items() if grad is not None}
        assert length(half_grads).isfinite()


# torch says so of norms that keep float32 weights, where a faster kernel is not used.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("form", vit_forms.FORMS)
def test_a_family_answers_alike(device, form):
    model, images = vit_forms.build(form)
    needs = Needs(logits=True, hidden=frozenset({0, 2}), features=True)
    with torch.no_grad():
        here = run_vit(model, images, needs)
        model, images = model.to(device), images.to(device)
        there = run_vit(model, images, needs)
        with torch.autocast(device.type, torch.bfloat16):
            half = run_vit(model, images, needs)
    for mine, theirs, near in zip(here.tensors(), there.tensors(), half.tensors(), strict=True):
        scale = mine.abs().max()
        assert (theirs.cpu() - mine).abs().max() <= 1e-4 * scale
        assert (near.float().cpu() - mine).abs().max() <= 0.15 * scale


def test_a_patch_embedded_alone_is_the_same_patch(device):
    """On a GPU a convolution may round to TF32, where a product does not: 1e-3 of the values."""
    model = vit(0, patch_size=8, embed_dim=48).to(device)
    images = torch.randn(4, 3, 16, 16, device=device)
    needs, keep = Needs(hidden=frozenset({0})), torch.arange(4, device=device).expand(4, -1)
    with torch.no_grad():
        whole = run_vit(model, images, needs).hidden[0]
        alone = run_vit(model, images, needs, keep).hidden[0]
    assert (whole - alone).abs().max() <= 2e-5 * whole.abs().max()


@pytest.mark.parametrize("form", ["class token", "average pooling", "attention pooling"])
def test_attention_beyond_float16_is_attention(device, form):
    """Queries and keys that float16 holds, and products of theirs that it does not."""
    model, images = vit_forms.build(form)
    model, images = model.to(device), images.to(device)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[: 2 * model.embed_dim] *= 2000
        if model.attn_pool is not None:
            model.attn_pool.latent *= 3000
            model.attn_pool.kv.weight[: model.embed_dim] *= 3000
        whole = run_vit(model, images, Needs(logits=True, attention=frozenset({0, 2})))
        with torch.autocast(device.type, torch.float16):
            half = run_vit(model, images, Needs(logits=True, attention=frozenset({0, 2})))
    assert half.logits.isfinite().all()
    for i, rows in half.attention.items():
        assert torch.allclose(rows.sum(-1), torch.ones_like(rows[..., 0]), atol=1e-5)
        if i == 0:  # later blocks read what was rounded before
            assert (rows - whole.attention[0]).abs().mean() < 0.01


def test_equal_scores_choose_the_first_patches(device):
    scores = torch.tensor([0.0, 2.0, 1.0, 1.0]).repeat(3, 50).to(device)
    twos, ones = torch.arange(1, 200, 4), torch.arange(200)[torch.arange(200) % 4 > 1]
    wanted = torch.cat([twos, ones])[:80].expand(3, -1)
    assert torch.equal(top_patches(scores, 80).cpu(), wanted)


def test_a_step_repeats_itself_where_torch_is_told_to(device, monkeypatch):
    """Between unequal grids too, whose interpolation in torch adds in any order on a GPU."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    case = Case("vitkd", seen="kept", shapes="unlike")
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (step(case, device) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert first[0] == second[0]
    for key, grad in first[1].items():
        assert grad is None or torch.equal(grad, second[1][key])


def test_resampled_vectors_are_the_same(device):
    vectors = torch.randn(2, 12, 5, requires_grad=True)
    moved = resample_patches(vectors.to(device), (3, 4), (5, 2))
    there = resample_patches(vectors, (3, 4), (5, 2))
    torch.testing.assert_close(moved.cpu(), there, rtol=1e-5, atol=1e-5)


# -- compiled -------------------------------------------------------------------------------------


def with_two_teachers(device: torch.device) -> tuple[Distillation, dict[str, Teacher], Batch]:
    """A student that chooses, two teachers of other shapes, one of which looks twice."""
    student = vit(0, depth=2)
    teachers = {
        "one": teacher_of(vit(1, depth=1), "one"),
        "two": teacher_of(vit(2, embed_dim=36, depth=2), "two"),
    }
    objectives = {
        "ce": CrossEntropy(weight=0.5),
        "kd": SoftKD(teacher="one"),
        "nkd": NKD(teacher="two"),
    }
    networks = {name: teacher.network for name, teacher in teachers.items()}
    plan = make_plan(
        network(student, "student"), networks, objectives, TeacherGuided(keep_rate=0.5)
    )
    for teacher in teachers.values():
        teacher.to(device)
    numbers = torch.arange(6)
    batch = Batch(torch.randn(6, 3, 16, 16), numbers % 5, numbers, numbers * 0, 0)
    return Distillation(student, plan).to(device), teachers, to(batch, device)


@pytest.mark.whole
# Of 4 forms here: a guide that also sees a part has as many, of one batch size and of any.
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=4)
def test_compiled_networks_compute_the_same_each_within_its_own_limit(device, quick_compiler):
    module, teachers, batch = with_two_teachers(device)
    plain = module(batch, teachers)
    compile_networks(module, *teachers.values())
    for rows in (6, 4, 5):  # a last batch, labels that are missing
        some = batch.rows(torch.arange(rows, device=device))
        losses = module(some, teachers)
        losses["loss"].backward()
        if rows == 6:
            for name, loss in plain.items():
                torch.testing.assert_close(losses[name], loss, rtol=1e-4, atol=1e-5)


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["maskedkd", "vitkd", "dmae"])
def test_memory_does_not_grow(device, on_gpu, name):
    objectives = {
        "maskedkd": {"ce": CrossEntropy(), "kd": SoftKD()},
        "vitkd": {"vitkd": ViTKD()},
        "dmae": {
            "mae": PixelReconstruction(decoder_dim=16, decoder_depth=1),
            "dmae": DMAE(any_teacher=True),
        },
    }[name]
    student, teacher = vit(0, num_classes=5 if name == "maskedkd" else 0), teacher_of(vit(1))
    plan = make_plan(
        network(student, "student"),
        {"teacher": teacher.network},
        objectives,
        MaskedKD(keep_rate=0.5) if name == "maskedkd" else None,
        RandomMasking(mask_rate=0.5) if name == "dmae" else None,
    )
    module = Distillation(student, plan).to(device)
    teacher.to(device)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    numbers, held = torch.arange(8), []
    batch = to(Batch(torch.randn(8, 3, 16, 16), numbers % 5, numbers, numbers * 0, 0), device)
    for number in range(200 if on_gpu else 12):
        optimizer.zero_grad()
        module(batch, {"teacher": teacher})["loss"].backward()
        optimizer.step()
        if number in (4, 11, 199):
            held.append(torch.cuda.memory_allocated(device) if on_gpu else living())
    assert len({*held}) == 1


def living() -> int:
    """Bytes of the tensors that Python holds."""
    found = [it for it in gc.get_objects() if type(it) in (Tensor, torch.nn.Parameter)]
    return sum(it.nbytes for it in found)
