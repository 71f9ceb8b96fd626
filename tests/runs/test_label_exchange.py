"""Labels made elsewhere: what is imported is what was answered, a student learns from it, and what
cannot be right is refused.
"""

import dataclasses
import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vitdistill.cli import main
from vitdistill.data.augment import Augment, InputSpec
from vitdistill.data.loader import TrainLoader
from vitdistill.data.source import open_source
from vitdistill.errors import ConfigError, DataError, NonFiniteError, Preempted, UserError
from vitdistill.labels.exchange import export_labels
from vitdistill.labels.store import LabelStore
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import SoftKD
from vitdistill.methods.maskedkd import MaskedKD
from vitdistill.recipes.config import (
    DataConfig,
    OptimConfig,
    Recipe,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from vitdistill.runs.label import LabelOptions
from vitdistill.runs.label_import import import_labels

pytestmark = pytest.mark.whole

CLASSES = ("ant", "bee", "cat")
COUNT, SIZE = 8, 24  # images a class, and of all three
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
USAGE, DATA, CONFIG, NON_FINITE = 64, 65, 78, 70
NUMBER = itertools.count()
FLOAT32 = LabelOptions(encoding="float32", part_size=10)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 12 validation images of 16 x 16."""
    root, random = tmp_path_factory.mktemp("data") / "images", np.random.default_rng(0)
    for split, count in (("train", COUNT), ("val", 4)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 120, (16, 16, 3))
                pixels[..., label] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def flat(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training images, without labels."""
    root = tmp_path_factory.mktemp("flat")
    for file in sorted(images.glob("train/*/*.png")):
        (root / f"{file.parent.name}-{file.name}").write_bytes(file.read_bytes())
    return root


@pytest.fixture
def recipe(images: Path) -> Callable[..., Recipe]:
    """``recipe(views=..., augment={...}, ...)``: plain KD without a teacher's model, 2 steps an
    epoch.
    """

    def make(
        views: int | None = None, augment: Any = (), data: Path = images, **changes: Any
    ) -> Recipe:
        view = Augment(**{"crop": "pad", "crop_padding": 2, **dict(augment)})
        fields: dict[str, Any] = {
            "name": "small",
            "student": StudentConfig(model="vit_tiny_patch16_224", model_args=VIT),
            "teachers": {"teacher": TeacherConfig()},
            "objectives": {
                "ce": CrossEntropy(weight=0.5),
                "kd": SoftKD(weight=0.5, temperature=2.0),
            },
            "data": DataConfig(dir=str(data), workers=0, augment=view, views=views),
            "optim": OptimConfig(warmup_epochs=0.0),
            "train": TrainConfig(epochs=2, batch_size=12, eval_batch_size=8),
        }
        return Recipe(**{**fields, **changes})

    return make


def answers(views: int = 2, classes: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """Right answers to every view of every image, view by view, with noise that makes each
    another.
    """
    random = np.random.default_rng(seed)
    labels = np.arange(SIZE) // COUNT
    logits = random.normal(0, 1, (views, SIZE, classes)) + 6 * np.eye(classes)[labels]
    return {
        "sample_id": np.tile(np.arange(SIZE), views),
        "view": np.repeat(np.arange(views), SIZE),
        "logits": logits.astype(np.float32).reshape(-1, classes),
    }


def save(path: Path, arrays: dict[str, Any]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **arrays)
        return path
    names = (
        {"classes": json.dumps([str(name) for name in arrays["classes"]])}
        if "classes" in arrays
        else None
    )
    columns = {
        name: list(values) if np.ndim(values) == 2 else values
        for name, values in arrays.items()
        if name != "classes"
    }
    pq.write_table(pa.table(columns).replace_schema_metadata(names), path, row_group_size=5)
    return path


def logits_of(store: LabelStore) -> np.ndarray:
    """(V, N, C), at the temperature the recipe reads."""
    views, samples = range(store.manifest.num_views), range(store.manifest.num_samples)
    return np.stack([store.records(view, samples).logits(2.0).numpy() for view in views])


def take(arrays: dict[str, np.ndarray], rows: Any) -> dict[str, np.ndarray]:
    return {name: values if name == "classes" else values[rows] for name, values in arrays.items()}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)
@given(data=st.data())
def test_what_is_imported_is_what_was_answered(
    data: Any, images: Path, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    views, part_size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 30))
    true = answers(views, seed=data.draw(st.integers(0, 99)))
    # Rows in any order, some of them twice.
    shuffled = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(views * SIZE)
    order = np.concatenate(
        [
            shuffled,
            np.array(data.draw(st.lists(st.integers(0, SIZE - 1), max_size=3)), dtype=np.int64),
        ]
    )
    arrays = take(true, order) if data.draw(st.booleans()) else take(true, slice(None))
    source = open_source(str(images), "train")
    if data.draw(st.booleans()):
        arrays["sample_id"] = np.array([source.key(int(i)) for i in arrays["sample_id"]])
    if views == 1 and data.draw(st.booleans()):
        del arrays["view"]
    number = next(NUMBER)
    path = save(tmp_path / f"a{number}.{data.draw(st.sampled_from(['npz', 'parquet']))}", arrays)
    mixed = data.draw(st.sampled_from([{}, {"reprob": 0.5}, {"mixup": 0.8, "cutmix": 1.0}]))
    chosen = recipe(augment=mixed)
    store = import_labels(
        path,
        chosen,
        tmp_path / f"labels{number}",
        LabelOptions(encoding="float32", part_size=part_size),
    )
    assert store.path.name == "teacher" and not list(store.missing_parts()) and store.verify() == []
    assert store.manifest.num_views == views
    assert logits_of(store).tobytes() == true["logits"].tobytes()
    spec = InputSpec((16, 16), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 1.0, "center")
    loader = TrainLoader(source, chosen.data.augment, spec, batch_size=12, seed=0)
    for view in range(views):
        (batch,) = loader.labelling(view, 0, SIZE, SIZE)
        assert store.records(view, range(SIZE)).pixels.tolist() == batch.checksums.tolist()


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
@pytest.mark.parametrize("kind", ["float32", "float16", "uint8"])
def test_export_and_import_give_the_same_targets(
    suffix: str, kind: Any, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    path = save(tmp_path / "a.npz", answers())
    first = import_labels(
        path, recipe(), tmp_path / "first", LabelOptions(encoding=kind, part_size=10)
    )
    export_labels(first, tmp_path / f"b.{suffix}")
    second = import_labels(tmp_path / f"b.{suffix}", recipe(), tmp_path / "second", FLOAT32)
    assert logits_of(first).tobytes() == logits_of(second).tobytes()
    for view in range(2):
        ours, theirs = (
            store.records(view, range(SIZE)).pixels.tolist() for store in (first, second)
        )
        assert ours == theirs
    assert first.manifest.about["classes"] == second.manifest.about["classes"] == list(CLASSES)
    changed = {
        key
        for key in first.manifest.identity
        if first.manifest.identity[key] != second.manifest.identity[key]
    }
    assert changed == {"teacher.weights", "teacher.classes"}


def test_sparse_encodings_are_written_for_the_recipes_temperature(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    path = save(tmp_path / "a.npz", answers())
    store = import_labels(path, recipe(), tmp_path / "labels", LabelOptions(encoding="topk", k=2))
    assert store.layout.logits is not None and store.layout.logits.temperatures == (2.0,)
    true = answers()["logits"].reshape(2, SIZE, 3) / 2
    np.testing.assert_allclose(
        np.exp(logits_of(store) / 2), np.exp(true - true.max(-1, keepdims=True)), atol=2e-3
    )
    with pytest.raises(ConfigError, match="right at 1 only"):
        import_labels(
            path,
            recipe(),
            tmp_path / "other",
            LabelOptions(encoding="topk", k=2, temperatures=(1.0,)),
        )
    assert not (tmp_path / "other").exists()


def test_a_student_learns_from_it_and_from_no_other_views(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "a.parquet", {**answers(views=1), "classes": np.array(CLASSES)})
    model = (
        "student.model_args={img_size: 16, patch_size: 4, embed_dim: 24, depth: 1, num_heads: 2}"
    )
    run = [
        "small_images_kd",
        "--data-dir",
        str(images),
        "-b",
        "12",
        "--warmup-epochs",
        "0",
        "--set",
        model,
        "--device",
        "cpu",
    ]
    labels, folder = str(tmp_path / "labels"), str(tmp_path / "run")
    assert main(["label", "import", str(tmp_path / "a.parquet"), *run, "--output", labels]) == 0
    assert "right on 100.0% of 24 training images" in capsys.readouterr().out
    assert (
        main(
            [
                "train",
                *run,
                "--epochs",
                "1",
                "--labels",
                labels,
                "--output",
                folder,
                "--log-every",
                "1",
            ]
        )
        == 0
    )
    assert "imported, stored labels, 24 of 24 records" in capsys.readouterr().out.replace("\n", " ")
    steps = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in steps if line["kind"] == "train"] == [1, 2]
    for change, field in (
        (["data.seed=1"], "view.seed"),
        (["--reprob", "1"], "view.augment.reprob"),
    ):
        words = [*run[:-2], *change, "--device", "cpu"]
        assert (
            main(
                [
                    "train",
                    *words,
                    "--epochs",
                    "1",
                    "--labels",
                    labels,
                    "--output",
                    str(tmp_path / "other"),
                ]
            )
            == DATA
        )
        assert field in capsys.readouterr().err
    assert main(["label", "export", labels, "--to", str(tmp_path / "b.npz"), "--views", "0"]) == 0
    assert main(["label", "export", labels, "--to", str(tmp_path / "b.npz")]) == CONFIG
    assert main(["label", "check", f"{labels}/teacher"]) == CONFIG
    assert "imported" in capsys.readouterr().err


def test_unlabelled_images_take_the_files_classes(
    flat: Path, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    random = np.random.default_rng(0).normal(size=(SIZE, 5)).astype(np.float32)
    arrays = {
        "sample_id": np.arange(SIZE),
        "logits": random,
        "classes": np.array(["v", "w", "x", "y", "z"]),
    }
    path = save(tmp_path / "a.npz", arrays)
    chosen = recipe(data=flat, objectives={"kd": SoftKD(temperature=2.0)})
    store = import_labels(path, chosen, tmp_path / "labels", FLOAT32)
    assert (
        store.manifest.identity["classes.names"]
        == store.manifest.about["classes"]
        == ["v", "w", "x", "y", "z"]
    )
    from vitdistill.runs.train import train

    taught = dataclasses.replace(
        chosen, teachers={"teacher": TeacherConfig(labels=str(store.path))}
    )
    assert train(taught, tmp_path / "run", device="cpu")["best_top1"] is None


def test_classes_are_matched_by_name(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    true = answers(classes=3)["logits"]
    order = [2, 0, 1]
    reordered = {**answers(), "logits": true[:, order], "classes": np.array(CLASSES)[order]}
    with pytest.raises(ConfigError, match=r"another order .*--reorder-classes"):
        import_labels(save(tmp_path / "a.npz", reordered), recipe(), tmp_path / "labels", FLOAT32)
    willing = recipe(teachers={"teacher": TeacherConfig(reorder_classes=True)})
    store = import_labels(tmp_path / "a.npz", willing, tmp_path / "labels", FLOAT32)
    assert logits_of(store).tobytes() == true.tobytes()

    # A file of more classes, one of them not finite, named by another file.
    wide = np.insert(true[:, order], 1, np.inf, axis=1)
    (tmp_path / "names.txt").write_text("cat\ndog\nant\nbee\n")
    path = save(tmp_path / "wide.parquet", {**answers(), "logits": wide})
    store = import_labels(
        path, recipe(), tmp_path / "wide", FLOAT32, classes=tmp_path / "names.txt"
    )
    assert logits_of(store).tobytes() == true.tobytes()
    assert store.layout.logits is not None and store.layout.logits.num_classes == 3
    with pytest.raises(
        DataError, match="has 4 logits a row, and the data set has 3 classes: name those"
    ):
        import_labels(path, recipe(), tmp_path / "unnamed", FLOAT32)
    for names, sentence in (
        ("cat\ndog\nant\nowl\n", "does not know 1 of the data set's 3 classes"),
        ("cat\ndog\nant\n", "names 3 classes, and .* has 4 logits a row"),
        ("cat\ncat\nant\nbee\n", "two classes called 'cat'"),
    ):
        (tmp_path / "names.txt").write_text(names)
        with pytest.raises(UserError, match=sentence):
            import_labels(path, recipe(), tmp_path / "no", FLOAT32, classes=tmp_path / "names.txt")
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    with pytest.raises(ConfigError, match="names other classes than"):
        import_labels(
            tmp_path / "a.npz", willing, tmp_path / "no", FLOAT32, classes=tmp_path / "names.txt"
        )
    assert not (tmp_path / "no").exists()


def with_row(name: str, row: int, value: Any) -> dict[str, Any]:
    arrays = {key: values.copy() for key, values in answers().items()}
    arrays[name][row] = value
    return arrays


def keyed(*keys: str) -> dict[str, Any]:
    rows = [f"{name}/{i:02d}.png" for name in CLASSES for i in range(COUNT)] * 2
    return {**answers(), "sample_id": np.array([*keys, *rows[len(keys) :]])}


def doubled(change: float) -> dict[str, Any]:
    arrays = take(answers(), [*range(2 * SIZE), 30, 5])
    arrays["logits"][-1] += change
    return arrays


SHIFTED = {**answers(), "logits": np.roll(answers()["logits"], 1, axis=1)}
OTHERS = {
    **answers(),
    "logits": np.tile(answers(1)["logits"][np.random.default_rng(3).permutation(SIZE)], (2, 1)),
}


@pytest.mark.parametrize(
    ("arrays", "error", "sentence"),
    [
        (
            take(answers(), np.delete(np.arange(48), [7, 30])),
            DataError,
            r"no answer to view 0 of sample 7 \(ant/07.png\), and lacks 2 of 48",
        ),
        (
            take(answers(), range(30)),
            DataError,
            r"no answer to view 1 of sample 6 \(ant/06.png\), and lacks 18 of 48",
        ),
        (
            take(answers(), range(24, 48)),
            DataError,
            r"no answer to view 0 of sample 0 \(ant/00.png\), and lacks 24 of 48",
        ),
        (
            with_row("view", 30, 10**9),
            DataError,
            r"no answer to view 1 of sample 6 .* and lacks 23,999,999,976 of",
        ),
        (with_row("view", 3, -1), DataError, "the view -1 in row 3: views count from 0"),
        (with_row("view", 3, 2**40), DataError, "the view 1099511627776 in row 3"),
        (
            with_row("sample_id", 5, 24),
            DataError,
            "the sample 24 in row 5, and the training images of .* are 0 to 23",
        ),
        (with_row("sample_id", 5, -1), DataError, "the sample -1 in row 5"),
        (
            keyed("ant/00.png", "bee/99.png"),
            DataError,
            r"the sample 'bee/99.png' in row 1, .* give keys like 'ant/00.png'",
        ),
        (
            with_row("sample_id", 5, 4),
            DataError,
            "two different answers to view 0 of sample 4 .*, in rows 4 and 5|no answer to view 0",
        ),
        (
            doubled(0.5),
            DataError,
            r"two different answers to view 0 of sample 5 \(ant/05.png\), in rows 5 and 49",
        ),
        (
            with_row("logits", 30, np.nan),
            NonFiniteError,
            r"beyond float32 in row 30, view 1 of sample 6 \(ant/06.png\)",
        ),
        (with_row("logits", (30, 1), -np.inf), NonFiniteError, "in row 30"),
        (
            {**answers(), "logits": answers()["logits"].astype(np.float64) * 1e39},
            NonFiniteError,
            "beyond float32 in row 0",
        ),
        (
            {**answers(), "logits": answers()["logits"][:, :2]},
            DataError,
            "has 2 logits a row, and the data set has 3 classes",
        ),
        (
            SHIFTED,
            ConfigError,
            "classes look permuted: in another order it would be right on 100.0%",
        ),
        (OTHERS, ConfigError, "not above chance .*they are of other images"),
        (
            {**answers(), "pixels": np.zeros(48, dtype=np.uint32)},
            DataError,
            r"another view 0 of sample 0 \(ant/00.png\) than this recipe",
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_what_cannot_be_right_is_refused(
    suffix: str,
    arrays: dict[str, Any],
    error: type[UserError],
    sentence: str,
    recipe: Callable[..., Recipe],
    tmp_path: Path,
) -> None:
    path = save(tmp_path / f"a.{suffix}", arrays)
    with pytest.raises(error, match=sentence) as caught:
        import_labels(path, recipe(), tmp_path / "labels", FLOAT32)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "labels").exists()


def test_equal_answers_may_come_twice(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    store = import_labels(
        save(tmp_path / "a.parquet", doubled(0.0)), recipe(), tmp_path / "labels", FLOAT32
    )
    assert logits_of(store).tobytes() == answers()["logits"].tobytes()


def test_the_recipe_has_to_be_one_that_can_read_them(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    path = save(tmp_path / "a.npz", answers())

    def refused(chosen: Recipe, options: LabelOptions = FLOAT32, **more: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            import_labels(path, chosen, tmp_path / "labels", options, **more)
        assert not (tmp_path / "labels").exists()
        return str(caught.value)

    two = {"one": TeacherConfig(), "two": TeacherConfig()}
    both = {"a": SoftKD(teacher="one"), "b": SoftKD(teacher="two")}
    assert "has no teacher" in refused(recipe(teachers={}, objectives={"ce": CrossEntropy()}))
    assert "several teachers (one, two)" in refused(recipe(teachers=two, objectives=both))
    assert "no teacher 'three', only one, two" in refused(
        recipe(teachers=two, objectives=both), teacher="three"
    )
    assert "set --views 2" in refused(recipe(views=3))
    assert "MaskedKD" in refused(recipe(selector=MaskedKD()))
    assert "--repeated-aug 1" in refused(recipe(augment={"repeated_aug": 2}))
    assert "hidden_dtype" in refused(
        recipe(), LabelOptions(encoding="float32", hidden_dtype="float32")
    )
    assert "no objective of the recipe reads logits" in refused(
        recipe(objectives={"ce": CrossEntropy()})
    )
    assert (
        import_labels(
            path, recipe(teachers=two, objectives=both), tmp_path / "labels", FLOAT32, teacher="two"
        ).path.name
        == "two"
    )


def test_an_import_goes_on_and_is_not_mixed_with_another(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    path = save(tmp_path / "a.npz", answers())
    store = import_labels(path, recipe(), tmp_path / "labels", FLOAT32)
    parts = {part: part.read_bytes() for part in store.path.glob("*/*.bin")}
    assert len(parts) == 6
    store.part_path(1, 1).unlink()
    kept = store.part_path(0, 0).stat().st_mtime_ns
    said: list[str] = []
    import_labels(path, recipe(), tmp_path / "labels", FLOAT32, say=said.append)
    assert "5 of 6 parts are there already" in said
    assert {part: part.read_bytes() for part in store.path.glob("*/*.bin")} == parts
    assert store.part_path(0, 0).stat().st_mtime_ns == kept
    other = save(tmp_path / "b.npz", answers(seed=1))
    with pytest.raises(DataError, match=r"holds labels of something else \(teacher.weights"):
        import_labels(other, recipe(), tmp_path / "labels", FLOAT32)


def test_a_wrong_view_stops_it_wherever_it_comes(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    first = import_labels(
        save(tmp_path / "a.npz", answers()), recipe(), tmp_path / "first", FLOAT32
    )
    export_labels(first, tmp_path / "b.npz")
    with np.load(tmp_path / "b.npz") as found:
        arrays = dict(found)
    arrays["pixels"][47] ^= 1
    with pytest.raises(
        DataError,
        match=(
            r"another view 1 of sample 23 \(cat/07.png\) than this recipe makes .*those of 1 of 4"
        ),
    ):
        import_labels(save(tmp_path / "c.npz", arrays), recipe(), tmp_path / "second", FLOAT32)
    assert list(LabelStore.open(tmp_path / "second").missing_parts()) == [(1, 2)]


def test_an_import_can_be_stopped(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", answers())
    store = import_labels(path, recipe(), tmp_path / "labels", FLOAT32)
    store.part_path(0, 1).unlink()

    def stop(text: str) -> None:
        if "there already" in text:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match="stopped by SIGTERM; what is written stays"):
        import_labels(path, recipe(), tmp_path / "labels", FLOAT32, say=stop)
    assert list(store.missing_parts()) == [(0, 1)]
    assert import_labels(path, recipe(), tmp_path / "labels", FLOAT32).status().records == 48


def test_rows_in_disorder_need_memory_and_rows_in_order_do_not(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    order = np.random.default_rng(0).permutation(48)
    tidy, mess = (
        save(tmp_path / "tidy.parquet", answers()),
        save(tmp_path / "mess.parquet", take(answers(), order)),
    )
    part = 10 * 3 * 4
    assert (
        import_labels(tidy, recipe(), tmp_path / "labels", FLOAT32, memory=2 * part)
        .status()
        .records
        == 48
    )
    with pytest.raises(DataError, match="sort the file by view and sample_id"):
        import_labels(mess, recipe(), tmp_path / "mess", FLOAT32, memory=2 * part)
    assert (
        import_labels(mess, recipe(), tmp_path / "mess", FLOAT32, memory=2 * 48 * 3 * 4)
        .status()
        .records
        == 48
    )


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["import"], USAGE, "FILE is missing"),
        (["import", "--output", "x", "a.npz"], USAGE, "FILE is missing, or not the first word"),
        (["import", "none.npz", "small_images_kd"], CONFIG, "no images are named"),
        (
            ["import", "none.npz", "small_images_kd", "--data-dir", "IMAGES", "-b", "12"],
            DATA,
            "there is no file none.npz",
        ),
        (
            ["import", "none.npz", "small_images_kd", "--data-dir", "IMAGES", "--teacher", "x"],
            CONFIG,
            "no teacher 'x', only teacher",
        ),
        (
            ["import", "none.npz", "small_images_kd", "--temperatures", "hot"],
            USAGE,
            "--temperatures",
        ),
        (["export", "nothing"], USAGE, "--to is missing"),
        (["export", "nothing", "--to", "a.npz"], DATA, "nothing holds no labels"),
        (["export", "nothing", "--to", "a.npz", "--views", "x"], DATA, "nothing holds no labels"),
    ],
)
def test_mistakes_on_the_command_line(
    words: list[str],
    code: int,
    sentence: str,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["label", *(str(images) if word == "IMAGES" else word for word in words)]) == code
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_says_what_the_file_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["label", "import", "--help"]) == 0
    text = capsys.readouterr().out
    assert "sample_id" in text and "--teacher" in text and "--classes" in text
    assert main(["label", "export", "--help"]) == 0
    assert "class_ids" in capsys.readouterr().out
