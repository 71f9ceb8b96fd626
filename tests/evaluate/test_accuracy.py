"""Metrics equal their definitions, whatever the sharding, and never count a broken answer as
right.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from vitdistill.errors import NonFiniteError
from vitdistill.evaluate.accuracy import Metrics


def answers(
    seed: int, num: int = 60, classes: int = 10
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num, classes, generator=generator)
    labels = torch.randint(0, classes, (num,), generator=generator)
    logits[::2].scatter_add_(1, labels[::2, None], torch.full((len(labels[::2]), 1), 4.0))
    return logits, labels, logits + torch.randn(num, classes, generator=generator)


def slow_ece(logits: torch.Tensor, labels: torch.Tensor) -> float:
    confidence, answer = logits.double().softmax(1).max(1)
    total = 0.0
    for index in range(15):
        inside = (confidence > index / 15) & (confidence <= (index + 1) / 15)
        if inside.any():
            right = (answer[inside] == labels[inside]).double().mean()
            total += abs(right - confidence[inside].mean()).item() * inside.double().mean().item()
    return total


@given(seed=st.integers(0, 10_000), classes=st.sampled_from([2, 3, 5, 6, 100]))
def test_values_are_their_definitions(seed, classes):
    logits, labels, teacher = answers(seed, classes=classes)
    metrics = Metrics()
    metrics.update(logits, labels, teacher)
    values = metrics.compute()
    k = min(5, classes)
    assert values["num_samples"] == 60
    among_five = (logits.topk(k).indices == labels[:, None]).any(1)
    assert values["top1"] == (logits.argmax(1) == labels).double().mean().item()
    assert values["top5"] == among_five.double().mean().item()
    nll = F.cross_entropy(logits.double(), labels).item()
    assert values["nll"] == pytest.approx(nll, rel=1e-12)
    assert values["ece"] == pytest.approx(slow_ece(logits, labels), rel=1e-9)
    assert values["agreement"] == (logits.argmax(1) == teacher.argmax(1)).double().mean().item()
    student, its = (x.double().log_softmax(1) for x in (logits, teacher))
    kl = F.kl_div(student, its, reduction="batchmean", log_target=True)
    assert values["kl"] == pytest.approx(kl.item(), rel=1e-9)


@given(seed=st.integers(0, 10_000), cut=st.integers(0, 60))
def test_batches_do_not_matter(seed, cut):
    logits, labels, teacher = answers(seed)
    whole, parts = Metrics(), Metrics()
    whole.update(logits, labels, teacher)
    parts.update(logits[cut:], labels[cut:], teacher[cut:])
    parts.update(logits[:cut], labels[:cut], teacher[:cut])
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("of_teacher", [False, True])
def test_broken_answers_are_an_error_and_not_right(value, of_teacher):
    broken = torch.zeros(4, 3)
    broken[1, 2] = value
    metrics, labels = Metrics(), torch.tensor([0, 2, 0, 0])
    metrics.update(*((torch.zeros(4, 3), labels, broken) if of_teacher else (broken, labels)))
    with pytest.raises(NonFiniteError, match="1 of 4 answers"):
        metrics.compute()


@pytest.mark.parametrize(
    ("logits", "labels", "expected"),
    [
        # Equal answers are the first class's.
        (torch.zeros(10, 10), torch.arange(10), {"top1": 0.1, "top5": 0.5, "ece": 0.0}),
        # Fewer than five classes, and certain answers.
        (torch.eye(3)[:2].log(), torch.arange(2), {"top1": 1, "top5": 1, "nll": 0, "ece": 0}),
    ],
)
def test_answers_by_hand(logits, labels, expected):
    metrics = Metrics()
    metrics.update(logits, labels)
    values = metrics.compute()
    assert {key: values[key] for key in expected} == pytest.approx(expected, abs=1e-12)


def test_labels_beyond_the_classes_are_errors():
    metrics = Metrics()
    metrics.update(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(NonFiniteError, match="class list"):
        metrics.compute()


def test_unlabelled_images_count_for_the_teacher_only():
    logits, labels, teacher = answers(1)
    metrics = Metrics()
    metrics.update(logits, torch.full_like(labels, -1), teacher)
    assert metrics.compute().keys() == {"num_samples", "agreement", "kl"}


def test_two_processes_give_what_one_gives(tmp_path, fork, join):
    logits, labels, teacher = answers(3)
    whole = Metrics()
    whole.update(logits, labels, teacher)
    expected = whole.compute()
    whole.merge_across_processes()  # alone
    assert whole.compute() == expected

    def shard(rank: int) -> None:
        rendezvous = f"file://{tmp_path}/rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
        metrics = Metrics()
        # Shards of different length: the last image belongs to one process alone.
        part = slice(0, 31) if rank == 0 else slice(31, None)
        metrics.update(logits[part], labels[part], teacher[part])
        metrics.merge_across_processes()
        assert metrics.compute() == pytest.approx(expected, rel=1e-12)
        dist.destroy_process_group()

    children = [fork(lambda rank=rank: shard(rank)) for rank in range(2)]
    assert [join(child) for child in children] == [0, 0]
