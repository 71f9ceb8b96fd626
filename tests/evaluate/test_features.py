"""Features are judged as the definitions say, whoever holds which image, and whatever their scale
and order.
"""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.models import create_model
from torch import Tensor

from vitdistill.cli import main
from vitdistill.data.augment import InputSpec
from vitdistill.data.loader import EvalLoader
from vitdistill.data.model_input import input_spec_of
from vitdistill.data.sources.base import ImageSource
from vitdistill.data.sources.open import open_source
from vitdistill.errors import ConfigError, DataError, NonFiniteError
from vitdistill.evaluate import knn, linear
from vitdistill.evaluate.features import evenly, extract, image_features
from vitdistill.evaluate.knn import knn_accuracy, knn_evaluation, knn_votes
from vitdistill.evaluate.linear import fit_logistic, linear_probe
from vitdistill.vit.needs import Needs
from vitdistill.vit.network import Network
from vitdistill.vit.output import ViTOutput
from vitdistill.vit.walk import run_vit
from vitdistill.weights.export import export_timm
from vitdistill.world import World, join_world

ALONE = World(0, 1, torch.device("cpu"))
COLOURS = {"ant": 0, "bee": 1, "cat": 2}
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
SPEC = InputSpec(image_size=(16, 16), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes(seed: int, count: int, num: int) -> Tensor:
    """Labels in which every class comes up."""
    return (
        torch.arange(count)[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
        % num
    )


seeds = st.integers(0, 10**6)


# --- k nearest neighbours ------------------------------------------------------------------------


def slow_votes(
    bank: Tensor, labels: Tensor, queries: Tensor, num_classes: int, k: int, temperature: float
) -> np.ndarray:
    """The definition, one query at a time in float64: the nearest first, equals at the k-th place
    share what is left.
    """
    rows, asked = (x.double().numpy() for x in (bank, queries))
    votes = np.zeros((len(asked), num_classes))
    for q, query in enumerate(asked):
        lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(query)
        similar = np.where(lengths > 0, rows @ query / np.where(lengths > 0, lengths, 1), 0)
        order = sorted(similar, reverse=True)
        last, nearest = order[k - 1], order[0]
        above = similar > last + 1e-6
        equal = np.abs(similar - last) <= 1e-6
        for i, label in enumerate(labels.tolist()):
            place = 1.0 if above[i] else (k - above.sum()) / equal.sum() if equal[i] else 0.0
            votes[q, label] += place * math.exp((similar[i] - nearest) / temperature)
    return votes


@given(
    seed=seeds,
    size=st.integers(1, 30),
    k=st.integers(1, 30),
    dim=st.integers(1, 6),
    temperature=st.sampled_from([0.07, 0.5, 5.0]),
)
def test_votes_are_their_definition(
    seed: int, size: int, k: int, dim: int, temperature: float
) -> None:
    k = min(k, size)
    bank, queries, labels = noise(seed, size, dim), noise(seed + 1, 7, dim), classes(seed, size, 4)
    votes = knn_votes(bank, labels, queries, 4, k, temperature)
    assert votes.dtype is torch.float64
    np.testing.assert_allclose(
        votes.numpy(), slow_votes(bank, labels, queries, 4, k, temperature), rtol=1e-4, atol=1e-6
    )


@given(seed=seeds, size=st.integers(1, 40), k=st.integers(1, 40), order=seeds)
def test_equals_share_the_last_places_and_order_does_not_matter(
    seed: int, size: int, k: int, order: int
) -> None:
    """Few different rows, many duplicates of other labels, rows of zeros: nearly every k cuts
    through equals.
    """
    k, generator = min(k, size), torch.Generator().manual_seed(seed)
    bank = torch.randint(-1, 2, (size, 2), generator=generator).float()
    queries = torch.randint(-1, 2, (9, 2), generator=generator).float()
    labels = torch.randint(0, 3, (size,), generator=generator)
    votes = knn_votes(bank, labels, queries, 3, k)
    np.testing.assert_allclose(
        votes.numpy(), slow_votes(bank, labels, queries, 3, k, 0.07), rtol=1e-4, atol=1e-9
    )
    shuffled = torch.randperm(size, generator=torch.Generator().manual_seed(order))
    np.testing.assert_allclose(
        knn_votes(bank[shuffled], labels[shuffled], queries, 3, k).numpy(),
        votes.numpy(),
        rtol=1e-9,
        atol=1e-12,
    )


def test_votes_by_hand() -> None:
    """Cosines 1, 0.6, 0 and -1 to the query, of classes 0, 1, 1, 0."""
    bank, labels = (
        torch.tensor([[2.0, 0.0], [3.0, 4.0], [0.0, 9.0], [-1.0, 0.0]]),
        torch.tensor([0, 1, 1, 0]),
    )
    query = torch.tensor([[5.0, 0.0]])
    assert knn_votes(bank, labels, query, 2, 3, 0.5)[0].tolist() == pytest.approx(
        [1, math.exp(-0.8) + math.exp(-2)], rel=1e-6
    )
    assert knn_votes(bank, labels, query, 2, 4, 2.0)[0].tolist() == pytest.approx(
        [1 + math.exp(-1), math.exp(-0.2) + math.exp(-0.5)]
    )
    assert knn_accuracy(bank, labels, query, torch.tensor([0]), 4, 0.1) == {"knn_top1": 1.0}
    assert knn_accuracy(bank, labels, query, torch.tensor([0]), 3, 10.0) == {
        "knn_top1": 0.0
    }  # two of class 1 outvote the nearest


def test_accuracy_counts_the_votes() -> None:
    bank, labels, queries, truth = (
        noise(0, 80, 3),
        classes(0, 80, 9),
        noise(1, 60, 3),
        classes(1, 60, 9),
    )
    votes = slow_votes(bank, labels, queries, 9, 20, 0.07)
    order = np.argsort(-votes, axis=1, kind="stable")
    top1 = np.mean(order[:, 0] == truth.numpy())
    top5 = np.mean(
        [
            y in row[:5] and votes[i, y] > 0
            for i, (row, y) in enumerate(zip(order, truth.tolist(), strict=True))
        ]
    )
    assert knn_accuracy(bank, labels, queries, truth) == pytest.approx(
        {"knn_top1": top1, "knn_top5": top5}
    )
    assert 0 < top1 < top5 < 1


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    args = noise(0, 50, 4), classes(0, 50, 7), noise(1, 33, 4), classes(1, 33, 7)
    whole = knn_accuracy(*args)
    for size in (1, 100, 50 * 32):
        monkeypatch.setattr(knn, "_SIMILARITIES", size)
        assert knn_accuracy(*args) == whole


@given(seed=seeds, num=st.integers(2, 12))
def test_classes_that_lie_apart_are_all_right(seed: int, num: int) -> None:
    centres = torch.eye(12)[:num]
    labels, truth = classes(seed, 60, num), classes(seed + 1, 30, num)
    bank, queries = (
        centres[labels] + 0.05 * noise(seed, 60, 12),
        centres[truth] + 0.05 * noise(seed + 1, 30, 12),
    )
    scores = knn_accuracy(bank, labels, queries, truth, k=60 // num // 2 or 1)
    assert set(scores.values()) == {1.0} and ("knn_top5" in scores) == (num > 5)
    assert linear_probe(bank, labels, queries, truth)["linear_top1"] == 1.0


def test_labels_that_mean_nothing_are_guessed() -> None:
    args = noise(0, 1000, 16), classes(0, 1000, 10), noise(1, 1000, 16), classes(1, 1000, 10)
    assert 0.06 < knn_accuracy(*args)["knn_top1"] < 0.14  # chance 0.1, four standard errors
    assert 0.06 < linear_probe(*args)["linear_top1"] < 0.14


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e30])
def test_scale_changes_nothing(scale: float) -> None:
    bank, labels, queries, truth = (
        noise(0, 90, 6),
        classes(0, 90, 3),
        noise(1, 60, 6),
        classes(1, 60, 3),
    )
    bank, queries = bank + 2 * F.one_hot(labels, 6), queries + 2 * F.one_hot(truth, 6)
    votes = knn_votes(bank, labels, queries, 3)
    torch.testing.assert_close(
        knn_votes(bank * scale, labels, queries * scale, 3), votes, rtol=1e-4, atol=1e-6
    )
    rows = torch.linspace(0.1, 10, 90)[
        :, None
    ]  # cosines do not see the length of a single one either
    torch.testing.assert_close(
        knn_votes(bank * rows, labels, queries, 3), votes, rtol=1e-4, atol=1e-6
    )
    plain, scaled = (
        linear_probe(bank, labels, queries, truth),
        linear_probe(bank * scale, labels, queries * scale, truth),
    )
    assert (
        scaled["linear_top1"] == pytest.approx(plain["linear_top1"], abs=1.5 / 60)
        and plain["linear_top1"] > 0.8
    )


def test_features_that_have_collapsed_answer_with_the_commonest_class() -> None:
    """All images alike but for rounding: rounding is no information."""
    labels, truth = torch.tensor([0] * 10 + [1] * 30), torch.tensor([1] * 8 + [0] * 2)
    bank, queries = torch.ones(40, 50) + 1e-8 * noise(0, 40, 50), torch.ones(10, 50)
    assert knn_accuracy(bank, labels, queries, truth)["knn_top1"] == 0.8
    assert linear_probe(bank, labels, queries, truth)["linear_top1"] == 0.8


def test_a_class_without_votes_is_never_right() -> None:
    bank, labels = torch.eye(7), torch.arange(7)
    assert knn_accuracy(bank, labels, torch.eye(7), torch.arange(7), k=1) == {
        "knn_top1": 1.0,
        "knn_top5": 1.0,
    }
    assert knn_accuracy(bank, labels, torch.eye(7), (torch.arange(7) + 1) % 7, k=1) == {
        "knn_top1": 0.0,
        "knn_top5": 0.0,
    }
    assert knn_accuracy(bank, labels, torch.eye(7)[:1], torch.tensor([9]), k=1) == {
        "knn_top1": 0.0,
        "knn_top5": 0.0,
    }


def test_unlabelled_images_are_left_out() -> None:
    bank, labels, queries, truth = (
        noise(0, 40, 3),
        classes(0, 40, 4),
        noise(1, 20, 3),
        classes(1, 20, 4),
    )
    some, asked = torch.arange(40) % 3 > 0, torch.arange(20) % 4 > 0
    masked = labels.where(some, -1), truth.where(asked, -1)
    expected = knn_accuracy(bank[some], labels[some], queries[asked], truth[asked])
    assert knn_accuracy(bank, masked[0], queries, masked[1]) == expected
    assert linear_probe(bank, masked[0], queries, masked[1]) == linear_probe(
        bank[some], labels[some], queries[asked], truth[asked]
    )
    with pytest.raises(DataError, match="no validation image has a label"):
        knn_accuracy(bank, labels, queries, torch.full_like(truth, -1))
    with pytest.raises(DataError, match="no training image has a label"):
        linear_probe(bank, torch.full_like(labels, -1), queries, truth)


@pytest.mark.parametrize("k", [0, 41])
def test_impossible_neighbours_are_refused(k: int) -> None:
    with pytest.raises(ConfigError) as caught:
        knn_accuracy(noise(0, 40, 3), classes(0, 40, 4), noise(1, 20, 3), classes(1, 20, 4), k=k)
    assert caught.value.field == "knn"


# --- linear probe --------------------------------------------------------------------------------


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_the_regression_is_at_its_minimum(l2: float) -> None:
    """Against scikit-learn's, whose C is 1 / (images x l2); and no slope is left."""
    from sklearn.linear_model import LogisticRegression

    x, y = noise(0, 300, 8) + 1.5 * F.one_hot(classes(0, 300, 4), 8), classes(0, 300, 4)
    weight, bias = fit_logistic(x, y, 4, l2)
    theirs = LogisticRegression(C=1 / (300 * l2), tol=1e-10, max_iter=5000).fit(
        x.double().numpy(), y.numpy()
    )

    def loss(weight: Tensor, bias: Tensor) -> Tensor:
        return F.cross_entropy(x.double() @ weight + bias, y) + l2 / 2 * weight.square().sum()

    ours = [part.double().requires_grad_() for part in (weight, bias)]
    found = loss(*ours)
    found.backward()
    assert all(part.grad is not None and part.grad.abs().max() < 1e-4 for part in ours)
    assert found.item() == pytest.approx(
        loss(torch.from_numpy(theirs.coef_.T), torch.from_numpy(theirs.intercept_)).item(), abs=1e-6
    )
    np.testing.assert_allclose(
        (weight - weight.mean(1, keepdim=True)).numpy(),
        theirs.coef_.T,
        atol=2e-2 if l2 < 1e-3 else 2e-3,
    )


def test_chunks_and_starts_do_not_move_the_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = noise(0, 200, 6) + F.one_hot(classes(0, 200, 3), 6), classes(0, 200, 3)
    weight, bias = fit_logistic(x, y, 3, 1e-2)
    monkeypatch.setattr(linear, "_LOGITS", 3 * 7)
    for start in (None, (noise(1, 6, 3), noise(2, 3))):
        before = None if start is None else [part.clone() for part in start]
        other, shift = fit_logistic(x, y, 3, 1e-2, start)
        torch.testing.assert_close(other, weight, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(shift - shift.mean(), bias - bias.mean(), atol=1e-3, rtol=1e-3)
        assert (
            start is None
            or before is None
            or all(torch.equal(a, b) for a, b in zip(start, before, strict=True))
        )


def test_a_linear_rule_among_loud_features_is_found_by_the_probe_and_not_by_neighbours() -> None:
    """One direction of 30 tells the classes, turned into all of them; the others are ten times
    louder.
    """
    turn = torch.linalg.qr(noise(5, 30, 30)).Q

    def images(seed: int, count: int) -> tuple[Tensor, Tensor]:
        truth = classes(seed, count, 2)
        x = noise(seed, count, 30)
        x[:, 0] = (2 * truth - 1) + 0.1 * x[:, 0]
        x[:, 1:] *= 10
        return x @ turn, truth

    train, val = images(0, 600), images(1, 300)
    linear = linear_probe(*train, *val)["linear_top1"]
    assert linear > 0.95 and linear > knn_accuracy(*train, *val)["knn_top1"] + 0.2


@given(seed=seeds)
def test_the_probe_repeats_itself_and_sees_no_shift_and_no_unit(seed: int) -> None:
    labels, truth = classes(seed, 60, 3), classes(seed + 1, 40, 3)
    bank, queries = (
        noise(seed, 60, 5) + F.one_hot(labels, 5),
        noise(seed + 1, 40, 5) + F.one_hot(truth, 5),
    )
    found = linear_probe(bank, labels, queries, truth)
    assert linear_probe(bank, labels, queries, truth) == found
    assert found["linear_l2"] in linear.L2_GRID
    units, shift = 2.0 ** torch.arange(5), 8 * noise(seed + 2, 5).round()
    other = linear_probe(bank * units + shift, labels, queries * units + shift, truth)
    assert other["linear_top1"] == pytest.approx(
        found["linear_top1"], abs=3.5 / 40
    )  # rounding may choose another penalty


def test_the_penalty_is_chosen_by_held_out_images() -> None:
    """Few images of many noisy features need a strong one, many images of a clear rule a weak
    one.
    """
    loud = noise(0, 200, 60)
    guess = (
        loud[:, 0] + noise(50, 200) > 0
    ).long()  # a weak penalty is right more often on the images it is fitted to
    noisy = linear_probe(loud, guess, loud, guess)
    sharp = noise(2, 2000, 3)
    truth = (sharp @ torch.tensor([1.0, 0.5, 0.1]) > 1.5).long()
    weak = linear_probe(sharp[:1500], truth[:1500], sharp[1500:], truth[1500:])
    assert noisy["linear_l2"] >= 1e-2 > 1e-3 >= weak["linear_l2"] and weak["linear_top1"] > 0.98


def test_too_few_images_for_a_probe_are_refused() -> None:
    with pytest.raises(DataError, match=r"9 labelled training images"):
        linear_probe(noise(0, 9, 3), classes(0, 9, 3), noise(1, 9, 3), classes(1, 9, 3))


# --- features of images --------------------------------------------------------------------------


def test_prefix_tokens_are_left_out_of_the_mean() -> None:
    tokens = torch.tensor(
        [[[100.0, 0.0], [50.0, 0.0], [1.0, 2.0], [3.0, 6.0]]], dtype=torch.bfloat16
    )
    output = ViTOutput(features=tokens, network=Network(num_prefix_tokens=2, has_class_token=True))
    assert (
        image_features(output).tolist() == [[2.0, 4.0]]
        and image_features(output).dtype is torch.float32
    )
    assert image_features(output, "class").tolist() == [[100.0, 0.0]]
    bare = ViTOutput(features=tokens)
    assert image_features(bare).tolist() == [[38.5, 2.0]]
    with pytest.raises(ConfigError, match="no class token"):
        image_features(bare, "class")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 training and 20 validation images of three colours; the classes are of unequal size."""
    root, random = tmp_path_factory.mktemp("features") / "photos", np.random.default_rng(0)
    for split, counts in (("train", (20, 10, 6)), ("val", (8, 7, 5))):
        for (name, channel), count in zip(COLOURS.items(), counts, strict=True):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 150, (16, 16, 3))
                pixels[..., channel] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i:02d}.png")
    return root


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "gap",
        "deit_tiny_distilled_patch16_224",
        "resnet10t",
        "eva",
        "eva gap",
    ],
)
@pytest.mark.parametrize("pool", ["mean", "class"])
def test_a_whole_data_set_in_sample_order(photos: Path, name: str, pool: str) -> None:
    if name == "gap":  # normalises after the pool
        model = create_model(
            "vit_tiny_patch16_224", num_classes=0, class_token=False, global_pool="avg", **VIT
        ).train()
        torch.nn.init.normal_(model.fc_norm.weight)
    elif name.startswith("eva"):  # run whole; normalises before the pool, or after
        model = create_model(
            "eva02_tiny_patch14_224",
            num_classes=0,
            global_pool="avg",
            use_fc_norm="gap" in name,
            **VIT,
        ).train()
        torch.nn.init.normal_(model.fc_norm.weight if "gap" in name else model.norm.weight)
    else:
        model = create_model(
            name, num_classes=0, **({"channels": [8, 8, 16, 16]} if name == "resnet10t" else VIT)
        ).train()
    loader = EvalLoader(open_source(str(photos), "val"), SPEC, batch_size=7)
    pools = name in ("resnet10t", "gap", "eva", "eva gap")
    if pool == "class" and pools:
        with pytest.raises(ConfigError, match="no class token"):
            extract(model, loader, ALONE, pool="class")
        return
    found = extract(model, loader, ALONE, pool=pool)  # type: ignore[arg-type]
    assert found is not None and model.training
    images = torch.cat([batch.images for batch in loader])
    model.eval()
    with torch.no_grad():
        if pools:
            expected = model(images)  # timm's own pooled features
        else:
            tokens = model.forward_features(images)
            expected = (
                tokens[:, 0] if pool == "class" else tokens[:, 1 + ("distilled" in name) :].mean(1)
            )
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)
    assert found[1].tolist() == [0] * 8 + [1] * 7 + [2] * 5


def test_features_that_are_not_finite_are_refused(photos: Path) -> None:
    model = create_model("vit_tiny_patch16_224", num_classes=0, **VIT)
    model.norm.register_forward_hook(
        lambda module, inputs, output: output.index_fill(0, torch.tensor([1]), torch.nan)
    )
    with pytest.raises(NonFiniteError, match="features of 4 of 20 images are NaN"):
        extract(model, EvalLoader(open_source(str(photos), "val"), SPEC, batch_size=5), ALONE)


def test_a_request_to_stop_ends_it(photos: Path) -> None:
    model = create_model("vit_tiny_patch16_224", num_classes=0, **VIT)
    train, val = (
        EvalLoader(open_source(str(photos), split), SPEC, batch_size=6)
        for split in ("train", "val")
    )
    for calls in (1, 6, 7, 10):
        asked = iter([False] * (calls - 1) + [True])
        assert (
            knn_evaluation(model, train, val, ALONE, stop=lambda asked=asked: next(asked)) is None
        )
        assert next(asked, None) is None and model.training
    assert knn_evaluation(model, train, val, ALONE) is not None


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_images_exactly(tmp_path: Path, photos: Path, count: int) -> None:
    """20 images over 2 and 3 processes in batches of 3; then 2 images, so that the third process
    has none.
    """
    model = create_model("vit_tiny_patch16_224", num_classes=0, **VIT)

    def loaders(here: World) -> list[EvalLoader]:
        source = open_source(str(photos), "val")
        return [EvalLoader(evenly(source, n), SPEC, batch_size=3, world=here) for n in (20, 2)]

    expected = [extract(model, loader, ALONE) for loader in loaders(ALONE)]

    def shard(rank: int) -> None:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=rank, world_size=count
        )
        with join_world("cpu") as here:
            for loader, whole in zip(loaders(here), expected, strict=True):
                found = extract(model, loader, here)
                assert (
                    found is not None
                    and whole is not None
                    and found[1].tolist() == whole[1].tolist()
                )
                torch.testing.assert_close(found[0], whole[0], rtol=1e-4, atol=1e-5)
            assert extract(model, loaders(here)[0], here, stop=lambda: rank == 1) is None
        torch.distributed.destroy_process_group()

    children = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                shard(rank)
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * count


class Numbered(ImageSource):
    """Images that are their number."""

    def __init__(self, labels: list[int]) -> None:
        self.name, self.classes = "numbers", tuple(map(str, range(max(labels) + 1)))
        self.labels = np.array(labels, dtype=np.int64)
        self.sizes = np.arange(len(labels), dtype=np.int64)

    def key(self, i: int) -> str:
        return str(i)

    def load(self, i: int) -> Image.Image:
        return Image.new("RGB", (i + 1, 1))


@given(
    num=st.integers(1, 6),
    size=st.integers(1, 200),
    count=st.integers(1, 60),
    order=st.sampled_from(["sorted", "in turn", "mixed"]),
)
def test_a_part_has_every_class_in_its_share(num: int, size: int, count: int, order: str) -> None:
    labels = [i % num for i in range(size)]
    if order == "sorted":
        labels.sort()
    elif order == "mixed":
        labels = [labels[i] for i in np.random.default_rng(size).permutation(size)]
    whole = Numbered(labels)
    part = evenly(whole, count)
    keys = [int(part.key(i)) for i in range(len(part))]
    assert len(part) == min(count, size) and keys == sorted(set(keys))
    assert all(
        part.image_size(i) == (key + 1, 1)
        and part.sizes[i] == key
        and part.labels[i] == labels[key]
        for i, key in enumerate(keys)
    )
    assert [part.key(i) for i in range(len(part))] == [
        evenly(whole, count).key(i) for i in range(len(part))
    ]
    for label in set(labels):
        share = labels.count(label) * len(part) / size
        assert abs((part.labels == label).sum() - share) < 1


# --- the command line ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An exported network without a classifier, with random weights."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("encoder") / "encoder"
    model = create_model("vit_tiny_patch16_224", num_classes=0, **VIT)
    export_timm(
        model,
        folder,
        architecture="vit_tiny_patch16_224",
        model_args=VIT,
        classes=None,
        input_spec=SPEC,
    )
    return str(folder)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("classifier") / "classifier"
    model = create_model("vit_tiny_patch16_224", num_classes=3, **VIT)
    export_timm(
        model,
        folder,
        architecture="vit_tiny_patch16_224",
        model_args=VIT,
        classes=tuple(COLOURS),
        input_spec=SPEC,
    )
    return str(folder)


@pytest.fixture
def evaluated(photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run ``eval`` on a model; what it printed, from JSON."""
    monkeypatch.setattr("vitdistill.cli.evaluate._speed", lambda *args: 1.0)

    def run(model: str, *words: str) -> dict[str, object]:
        capsys.readouterr()
        assert (
            main(
                [
                    "eval",
                    *words,
                    "--json",
                    model,
                    "--data-dir",
                    str(photos),
                    "--workers",
                    "0",
                    "--device",
                    "cpu",
                ]
            )
            == 0
        )
        found: dict[str, object] = json.loads(capsys.readouterr().out)
        return found

    return run


def test_an_encoder_without_a_classifier_is_judged_by_its_features(
    photos, encoder, evaluated
) -> None:
    found = evaluated(encoder, "--knn", "5", "--linear-probe")
    assert not {"top1", "top5", "nll", "ece", "knn_top5"} & found.keys()
    assert (
        found["num_samples"] == 20
        and found["num_train_samples"] == 36
        and found["pool"] == "mean"
        and found["knn_k"] == 5
    )
    assert found["no_top1"] == f"{encoder} has no classifier"
    model = create_model(f"local-dir:{encoder}", pretrained=True).eval()
    (train, labels), (val, truth) = (
        (torch.cat([b.images for b in loader]), torch.cat([b.labels for b in loader]))
        for loader in (
            EvalLoader(open_source(str(photos), split), input_spec_of(model), batch_size=50)
            for split in ("train", "val")
        )
    )
    with torch.no_grad():
        outputs = [run_vit(model, images, Needs(features=True)) for images in (train, val)]
    pooled = [image_features(output) for output in outputs]
    assert found["knn_top1"] == pytest.approx(
        knn_accuracy(pooled[0], labels, pooled[1], truth, 5)["knn_top1"]
    )
    assert found["linear_top1"] == pytest.approx(
        linear_probe(pooled[0], labels, pooled[1], truth)["linear_top1"], abs=1.5 / 20
    )
    by_class = evaluated(encoder, "--knn=5", "--pool", "class")
    tokens = [image_features(output, "class") for output in outputs]
    assert by_class["knn_top1"] == pytest.approx(
        knn_accuracy(tokens[0], labels, tokens[1], truth, 5)["knn_top1"]
    )
    assert by_class["pool"] == "class" and "linear_top1" not in by_class


def test_a_classifier_is_judged_by_both(classifier, evaluated) -> None:
    plain = evaluated(classifier)
    assert not {"knn_top1", "linear_top1", "pool", "no_top1"} & plain.keys()
    both = evaluated(classifier, "--knn")
    assert both["knn_k"] == 20 and {"knn_top1", "top1", "ece"} <= both.keys()
    assert {key: value for key, value in both.items() if key in plain} == plain


def test_the_table_shows_them(photos, encoder, classifier, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("vitdistill.cli.evaluate._speed", lambda *args: 1.0)
    words = [
        "--data-dir",
        str(photos),
        "--workers",
        "0",
        "--device",
        "cpu",
        "--linear-probe",
        "--knn",
    ]
    assert main(["eval", encoder, *words]) == 0
    printed = capsys.readouterr().out
    rows = (
        "k-NN top-1 (k 20, T 0.07)",
        "linear probe top-1 (L2 ",
        "mean of the patches, 36 training images",
        "has no classifier",
    )
    assert all(row in printed for row in rows)
    assert "calibration" not in printed and " top-5" not in printed
    assert main(["eval", classifier, *words]) == 0
    printed = capsys.readouterr().out
    assert (
        all(row in printed for row in (*rows[:3], "calibration", " top-5"))
        and "no accuracy of its own" not in printed
    )


def test_a_classifier_of_other_classes_still_has_features(
    tmp_path, photos, classifier, evaluated, capsys
) -> None:
    (tmp_path / "photos").mkdir()
    for split in ("train", "val"):
        (tmp_path / "photos" / split).mkdir()
        for name in COLOURS:
            (tmp_path / "photos" / split / f"other {name}").symlink_to(photos / split / name)
    words = ["--workers", "0", "--device", "cpu", "--json"]
    assert main(["eval", classifier, "--data-dir", str(tmp_path / "photos"), *words]) == 78
    assert "does not know 3 of the data set's 3 classes" in capsys.readouterr().err
    assert (
        main(["eval", classifier, "--data-dir", str(tmp_path / "photos"), *words, "--knn", "7"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert "top1" not in found and "does not know 3 of the data set's 3 classes" in found["no_top1"]
    assert found["knn_top1"] == evaluated(classifier, "--knn", "7")["knn_top1"]


REFUSED = [
    ([], "has no classifier, so it has no accuracy: give --knn or --linear-probe"),
    (["--pool", "class"], "--pool has no effect without --knn or --linear-probe"),
    (["--knn", "0"], "--knn is 0: give at least 1"),
    (["--knn", "-3"], "--knn is -3: give at least 1"),
    (["--knn", "37"], "--knn is 37, and there are only 36 training images"),
    (["--knn", "--split", "train"], "--knn learns from the training images"),
    (["--linear-probe", "--split", "train"], "--linear-probe learns from the training images"),
    (["--knn", "--teacher-model", "CLASSIFIER"], "leave --teacher-model out"),
]


@pytest.mark.parametrize(("words", "sentence"), REFUSED)
def test_what_cannot_take_effect_is_refused(
    words, sentence, photos, encoder, classifier, capsys
) -> None:
    words = [classifier if word == "CLASSIFIER" else word for word in words]
    capsys.readouterr()
    assert (
        main(
            [
                "eval",
                encoder,
                "--data-dir",
                str(photos),
                "--workers",
                "0",
                "--device",
                "cpu",
                *words,
            ]
        )
        == 78
    )
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_a_class_token_that_is_not_there_is_refused(tmp_path, photos, capsys) -> None:
    args = {**VIT, "class_token": False, "global_pool": "avg"}
    model = create_model("vit_tiny_patch16_224", num_classes=0, **args)
    export_timm(
        model,
        tmp_path / "gap",
        architecture="vit_tiny_patch16_224",
        model_args=args,
        classes=None,
        input_spec=SPEC,
    )
    words = [
        "--data-dir",
        str(photos),
        "--workers",
        "0",
        "--device",
        "cpu",
        "--knn",
        "--pool",
        "class",
    ]
    assert main(["eval", str(tmp_path / "gap"), *words]) == 78
    assert "no class token" in capsys.readouterr().err


def test_a_bank_of_other_classes_is_refused(tmp_path, photos, encoder, capsys) -> None:
    (tmp_path / "photos" / "train").mkdir(parents=True)
    (tmp_path / "photos" / "val").symlink_to(photos / "val")
    for name in ("ant", "bee"):
        (tmp_path / "photos" / "train" / name).symlink_to(photos / "train" / name)
    assert (
        main(["eval", encoder, "--data-dir", str(tmp_path / "photos"), "--knn", "--device", "cpu"])
        == 65
    )
    assert "has other classes than expected: it lacks 1 ('cat')" in capsys.readouterr().err


def test_the_number_of_neighbours_may_be_left_out_anywhere() -> None:
    from vitdistill.cli.evaluate import _with_k

    assert _with_k(["runs/a", "--knn"]) == ["runs/a", "--knn", "20"]
    assert _with_k(["--knn", "runs/a"]) == ["--knn", "20", "runs/a"]
    assert _with_k(["--knn", "5", "--json"]) == ["--knn", "5", "--json"]
    assert _with_k(["--knn", "--json"]) == ["--knn", "20", "--json"]
    assert _with_k(["--knn=5", "x"]) == ["--knn=5", "x"]
