"""ViTs of a few thousand random weights on 16 x 16 images, for tests of methods on two networks."""

from dataclasses import replace
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vitdistill.data.augment import InputSpec
from vitdistill.data.batch import Batch
from vitdistill.distill.teacher import Teacher
from vitdistill.vit.copies import on_meta
from vitdistill.vit.families import describe_network
from vitdistill.vit.flops import count_flops
from vitdistill.vit.needs import Needs
from vitdistill.vit.network import Network
from vitdistill.vit.output import ViTOutput
from vitdistill.vit.walk import run_vit

SIZE = (16, 16)
DISTILLED = "deit_tiny_distilled_patch16_224"
ROTARY = "vit_small_patch16_dinov3"
WALKED: dict[str, tuple[str, dict[str, Any]]] = {
    "rotary": (ROTARY, {}),
    "biased": ("beitv2_base_patch16_224", {"global_pool": "token"}),
    "native": (
        "naflexvit_base_patch16_map",
        {"class_token": True, "global_pool": "token", "pos_embed_grid_size": (3, 5)},
    ),
}
"""A network of each family that is walked besides the plain ones."""
NO_CLASS = {"class_token": False, "global_pool": "avg"}
SETTINGS = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2}


def vit(
    seed: int = 0, name: str = "vit_tiny_patch16_224", std: float = 0.3, **args: Any
) -> nn.Module:
    """Three blocks on 4 x 4 patches, 5 classes; ``args`` replace timm's."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **{**SETTINGS, "num_classes": 5, **args}).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=std)
    return model


STUDENT = Network(
    name="student",
    architecture="tiny",
    image_size=(224, 224),
    depth=12,
    dim=192,
    num_classes=10,
    num_parameters=5,
    grid=(14, 14),
    patch_size=(16, 16),
    num_prefix_tokens=1,
    walks=True,
    attention_source="class",
)
TEACHER = replace(STUDENT, name="teacher", architecture="small", dim=384, grid=(16, 16), depth=8)
CNN = Network("teacher", "resnet18", (224, 224), 5, 512, num_classes=10, num_parameters=9)


def recorded_flops(
    model: nn.Module, size: tuple[int, int], needs: Needs, num_keep: int | None = None
) -> int:
    """What a pass of `run_vit` costs an image."""
    keep = None if num_keep is None else torch.zeros(1, num_keep, dtype=torch.int64, device="meta")
    with count_flops() as counter:
        run_vit(on_meta(model), torch.empty(1, 3, *size, device="meta"), needs, keep)
    return counter.get_total_flops()


def network(model: nn.Module, name: str = "teacher") -> Network:
    return describe_network(model, name, "small", SIZE)


def teacher_of(model: nn.Module, name: str = "teacher", side: int = 16) -> Teacher:
    """One of ``side`` pixels for images of 16."""
    specs = [InputSpec((size, size), (0.5,) * 3, (0.5,) * 3) for size in (side, 16)]
    return Teacher(model, describe_network(model, name, name, (side, side)), *specs)


def batch_of(count: int = 3, seed: int = 0) -> Batch:
    numbers = torch.arange(count)
    images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))
    return Batch(images, numbers, numbers, numbers * 0, 0, seed=seed)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kept(count: int, images: int = 3, patches: int = 16) -> Tensor:
    """``count`` different patches of each image, in no order."""
    generators = (torch.Generator().manual_seed(i) for i in range(images))
    return torch.stack([torch.randperm(patches, generator=g)[:count] for g in generators])


def outputs(
    objective: Any, student: nn.Module, teacher: nn.Module, keep: Tensor | None = None
) -> tuple[ViTOutput, ViTOutput]:
    """What the objective needs of both; the teacher sees the patches ``keep``."""
    images = batch_of().images
    answer = run_vit(teacher, images, objective.teacher_needs(network(teacher)), keep)
    needs = objective.student_needs(network(student, "student"))
    return run_vit(student, images, needs), answer


def loss_of(
    objective: Any, student: nn.Module, teacher: nn.Module, keep: Tensor | None = None
) -> Tensor:
    """The loss of `batch_of`, through an adapter where the objective has one."""
    adapter = objective.adapter(network(student, "student"), network(teacher))
    loss: Tensor = objective.loss(*outputs(objective, student, teacher, keep), batch_of(), adapter)
    return loss
