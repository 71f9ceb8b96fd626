"""Features of a whole data set, in sample order, whoever holds which image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models import create_model

from vitdistill.data.augment import InputSpec
from vitdistill.data.loader import EvalLoader
from vitdistill.data.sources.base import ImageSource
from vitdistill.errors import ConfigError, NonFiniteError
from vitdistill.evaluate.features import Stopped, extract, image_features
from vitdistill.evaluate.knn import knn_evaluation
from vitdistill.vit.network import Network
from vitdistill.vit.output import ViTOutput
from vitdistill.world import World, join_world

ALONE = World(0, 1, torch.device("cpu"))
PLAIN = "vit_tiny_patch16_224"
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
SPEC = InputSpec(image_size=(16, 16), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


class Numbered(ImageSource):
    """20 images whose pixels follow from their number."""

    name, classes = "numbers", ("a", "b", "c")
    labels = np.repeat([0, 1, 2], (8, 7, 5))
    sizes = np.ones(20, dtype=np.int64)

    def key(self, i: int) -> str:
        return str(i)

    def load(self, i: int) -> Image.Image:
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        return Image.fromarray(pixels)


SOURCE = Numbered()


def tiny(name: str = PLAIN, **changes) -> torch.nn.Module:
    """A network in training mode, whose norms are not at their initial value."""
    model = create_model(name, num_classes=0, **{**VIT, **changes}).train()
    for name, parameter in model.named_parameters():
        if "norm.weight" in name:
            torch.nn.init.normal_(parameter)
    return model


# Those run whole, or without a class token, give timm's own pooled features.
POOLED = {
    "gap": lambda: tiny(class_token=False, global_pool="avg"),
    "resnet": lambda: create_model("resnet10t", num_classes=0, channels=[8, 8, 16, 16]).train(),
}
TOKENS = {
    "plain": tiny,
    "distilled": lambda: tiny("deit_tiny_distilled_patch16_224"),
    "eva": lambda: tiny("eva02_tiny_patch14_224", global_pool="avg", use_fc_norm=False),
    "eva gap": lambda: tiny("eva02_tiny_patch14_224", global_pool="avg", use_fc_norm=True),
    "beit": lambda: tiny("beit_base_patch16_224", global_pool="avg"),
    "cait, run whole": lambda: tiny("cait_xxs24_224"),
}


@pytest.mark.parametrize("name", [*TOKENS, *POOLED])
@torch.no_grad()
def test_a_whole_data_set_in_sample_order(name):
    model = (TOKENS | POOLED)[name]()
    loader = EvalLoader(SOURCE, SPEC, batch_size=7)
    found = {"mean": extract(model, loader, ALONE, pool="mean")}
    if name in POOLED:
        with pytest.raises(ConfigError, match="no class token"):
            extract(model, loader, ALONE, pool="class")
    else:
        found["class"] = extract(model, loader, ALONE, pool="class")
    assert model.training
    images = torch.cat([batch.images for batch in loader])
    model.eval()
    if name in POOLED:
        expected = {"mean": model(images)}
    else:
        tokens = model.forward_features(images)
        pooled = {"class": tokens[:, 0], "mean": tokens[:, model.num_prefix_tokens :].mean(1)}
        after = getattr(model, "fc_norm", torch.nn.Identity())
        expected = {pool: after(vector) for pool, vector in pooled.items()}
    for pool, (features, labels) in found.items():
        torch.testing.assert_close(features, expected[pool], rtol=1e-4, atol=1e-5)
        assert labels.tolist() == SOURCE.labels.tolist()


def test_prefix_tokens_are_left_out_of_the_mean():
    rows = [[[100.0, 0.0], [50.0, 0.0], [1.0, 2.0], [3.0, 6.0]]]
    bare = ViTOutput(features=torch.tensor(rows, dtype=torch.bfloat16))
    network = Network(num_prefix_tokens=2, has_class_token=True)
    output = ViTOutput(features=bare.features, network=network)
    assert image_features(output).tolist() == [[2.0, 4.0]]
    assert image_features(output).dtype is torch.float32
    assert image_features(output, "class").tolist() == [[100.0, 0.0]]
    assert image_features(bare).tolist() == [[38.5, 2.0]]
    with pytest.raises(ConfigError, match="no class token"):
        image_features(bare, "class")


def test_features_that_are_not_finite_are_refused():
    model, first = tiny(), torch.tensor([1])
    model.norm.register_forward_hook(lambda *args: args[-1].index_fill(0, first, torch.nan))
    with pytest.raises(NonFiniteError, match="4 of 20 images"):
        extract(model, EvalLoader(SOURCE, SPEC, batch_size=5), ALONE)


def test_a_request_to_stop_ends_it():
    model, loaders = tiny(), [EvalLoader(SOURCE, SPEC, batch_size=6) for _ in range(2)]
    for calls in (1, 4, 5, 8):
        asked = iter([False] * (calls - 1) + [True])
        with pytest.raises(Stopped):
            knn_evaluation(model, *loaders, ALONE, stop=lambda a=asked: next(a))
        assert next(asked, None) is None and model.training
    assert knn_evaluation(model, *loaders, ALONE)["num_samples"] == 20


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_images_exactly(tmp_path: Path, fork, join, count):
    """20 images in batches of 3; then 2 images, so that the third process has none."""
    model = tiny()

    def loaders(here: World) -> list[EvalLoader]:
        return [EvalLoader(SOURCE, SPEC, batch_size=3, world=here, limit=n) for n in (20, 2)]

    expected = [extract(model, loader, ALONE) for loader in loaders(ALONE)]

    def shard(rank: int) -> None:
        rendezvous = f"file://{tmp_path}/rendezvous"
        torch.distributed.init_process_group(
            "gloo", init_method=rendezvous, rank=rank, world_size=count
        )
        with join_world("cpu") as here:
            for loader, whole in zip(loaders(here), expected, strict=True):
                features, labels = extract(model, loader, here)
                assert labels.tolist() == whole[1].tolist()
                torch.testing.assert_close(features, whole[0], rtol=1e-4, atol=1e-5)
            with pytest.raises(Stopped):
                extract(model, loaders(here)[0], here, stop=lambda: rank == 1)
        torch.distributed.destroy_process_group()

    children = [fork(lambda rank=rank: shard(rank)) for rank in range(count)]
    assert [join(child) for child in children] == [0] * count
