"""``vitdistill label`` as its user meets it: the whole way once, and every mistake in one sentence
that changes no file.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitdistill.cli import main
from vitdistill.labels import LabelStore

pytestmark = pytest.mark.whole

USAGE, DATA, CONFIG = 64, 65, 78
COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
VIT = [
    "--set",
    "student.model_args={img_size: 16, patch_size: 4, embed_dim: 24, depth: 2, num_heads: 2}",
]
SHORT = ["--data-dir", "photos", "--epochs", "2", "--warmup-epochs", "0", "-b", "12"]
TEACHER = ["--teacher-model", "runs/teacher/last"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a teacher, and its labels of two views."""
    root = tmp_path_factory.mktemp("home")
    random = np.random.default_rng(0)
    for split, count in (("train", 11), ("val", 20)):
        for name, colour in COLOURS.items():
            (root / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + random.normal(0, 40, (16, 16, 3)), 0, 255)
                Image.fromarray(pixels.astype("uint8")).save(
                    root / "photos" / split / name / f"{i:02d}.png"
                )
    before = Path.cwd()
    os.chdir(root)
    try:
        assert (
            main(
                [
                    "train",
                    "small_images_alone",
                    *SHORT,
                    "--output",
                    "runs/teacher",
                    "--device",
                    "cpu",
                    *VIT,
                ]
            )
            == 0
        )
        assert (
            main(
                [
                    "label",
                    "small_images_kd",
                    *SHORT,
                    *TEACHER,
                    "--output",
                    "labels",
                    "--device",
                    "cpu",
                    *VIT,
                ]
            )
            == 0
        )
    finally:
        os.chdir(before)
    return root


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


def tree(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def test_from_a_teacher_to_a_student_that_never_saw_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = LabelStore.open("labels")
    assert (
        store.path.name == "teacher"
        and store.status().records == 33 * 2
        and store.records(1, [32, 0]).logits().shape == (2, 3)
    )
    words = ["small_images_kd", *SHORT, "--labels", "labels", "--seed", "3"]
    assert main(["explain", *words, *VIT]) == 0
    text = capsys.readouterr().out
    assert (
        "teacher, runs/teacher/last: does not run; its labels are read" in text and "0% of" in text
    )
    assert main(["train", *words, "--output", "runs/stored", "--device", "cpu", *VIT]) == 0
    text = capsys.readouterr().out
    assert (
        "teacher: runs/teacher/last, stored labels, 66 of 66 records, 2 views used" in text
        and "done: top-1" in text
    )
    assert (
        "seed: 0" in (here / "runs" / "stored" / "recipe.yaml").read_text()
    )  # the labels', for the views
    assert main(["eval", "runs/stored", "--data-dir", "photos", "--device", "cpu"]) == 0
    # A finished run, by its own recipe, is not repeated.
    assert main(["train", "runs/stored", "--output", "runs/stored", "--device", "cpu"]) == 0
    assert "finished already" in capsys.readouterr().out


def test_labels_are_looked_after(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(here / "labels")
    assert main(["label", "status", "labels"]) == 0
    assert capsys.readouterr().out.startswith("teacher: complete, 2 of 2 parts, 66 records, ")
    assert main(["label", "info", "labels"]) == 0
    text = capsys.readouterr().out
    for words in (
        "3 logits in float16",
        "33 images x 2 views",
        "view.augment.crop_padding",
        "teacher.weights",
        "made with torch",
    ):
        assert words in text
    assert (
        main(["label", "verify", "labels"]) == 0
        and "0 files are damaged" in capsys.readouterr().out
    )
    assert main(["label", "check", "labels", "--samples", "20", "--device", "cpu"]) == 0
    assert (
        "20 records answered anew: 20 views as labelled, top class equal in 100.0%"
        in capsys.readouterr().out
    )
    assert (
        main(["label", "prune", "labels/teacher", "--to", str(tmp_path / "one"), "--views", "1"])
        == 0
    )
    assert (
        main(
            [
                "label",
                "merge",
                str(tmp_path / "both"),
                "--from",
                str(tmp_path / "one"),
                "labels/teacher",
            ]
        )
        == 0
    )
    assert LabelStore.open(tmp_path / "both").status().records == 66
    assert (
        main(
            [
                "label",
                "prune",
                "labels",
                "--to",
                str(tmp_path / "two"),
                "--encoding",
                "topk",
                "--k",
                "2",
            ]
        )
        == 0
    )
    assert LabelStore.open(tmp_path / "two").layout.logits.temperatures == (1.0,)  # type: ignore[union-attr]
    assert tree(here / "labels") == before


def test_long_work_is_not_silent(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def printed(verb: str, *words: str) -> list[str]:
        capsys.readouterr()
        assert main(["label", verb, *words]) == 0
        return capsys.readouterr().out.splitlines()

    assert len(printed("merge", str(tmp_path / "short"), "--from", "labels/teacher")) == 1
    monkeypatch.setattr("vitdistill.cli.say.EVERY_S", 0.0)
    lines = printed("merge", str(tmp_path / "long"), "--from", "labels/teacher")
    assert [line.partition(":")[0] for line in lines[:-1]] == [
        "1 of 2 parts copied",
        "2 of 2 parts copied",
    ]
    lines = printed("prune", "labels/teacher", "--to", str(tmp_path / "one"), "--views", "1")
    assert [line.partition(":")[0] for line in lines[:-1]] == ["1 of 1 parts written"]


def test_more_views_are_added_by_the_same_command(here: Path, tmp_path: Path) -> None:
    words = [
        "label",
        "small_images_kd",
        *SHORT,
        *TEACHER,
        "--output",
        str(tmp_path),
        "--device",
        "cpu",
        *VIT,
    ]
    assert main([*words, "--views", "1"]) == 0 and main([*words, "--views", "3"]) == 0
    assert LabelStore.open(tmp_path).status().records == 33 * 3


LABEL = ["label", "small_images_kd", *SHORT, *TEACHER, *VIT]
TRAIN = ["train", "small_images_kd", *SHORT, *VIT]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["label", "status"], USAGE),
        (["label", "status", "nowhere"], DATA),
        (["label", "stauts", "labels"], USAGE),
        ([*LABEL, "--labels", "labels"], USAGE),
        ([*LABEL, "--encoding", "topk", "--k", "0", "--output", "new"], CONFIG),
        ([*LABEL, "--k", "3", "--output", "new"], CONFIG),
        ([*LABEL, "--encoding", "uint8", "--output", "new"], USAGE),
        ([*LABEL, "--temperatures", "warm", "--output", "new"], USAGE),
        ([*LABEL, "--output", "photos"], CONFIG),
        ([*LABEL, "--seed", "9", "--output", "labels"], DATA),
        (["label", "small_images_kd", *SHORT, "--output", "new", *VIT], CONFIG),
        (["label", "small_images_dmae", "--data-dir", "photos"], USAGE),
        (["label", "merge", "new"], USAGE),
        (["label", "prune", "labels"], USAGE),
        (["label", "prune", "labels", "--to", "new", "--temperatures", "2"], CONFIG),
        (["label", "check", "labels", "--samples", "0"], CONFIG),
        (["label", "export", "labels", "--to", "new.npz"], CONFIG),
        ([*TRAIN, "--labels", "nowhere"], DATA),
        ([*TRAIN, "--labels", "labels", "--views", "3"], CONFIG),
        ([*TRAIN, "--labels", "labels", "--mixup", "0.5"], DATA),
        (["train", "small_images_libkd", *SHORT, "--labels", "labels"], USAGE),
        (["train", "small_images_alone", *SHORT, "--labels", "labels", *VIT], USAGE),
        (["train", "small_images_maskedkd", *SHORT, "--labels", "labels", *VIT], CONFIG),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(
    here: Path, words: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(here)
    assert main(words) == code
    error = capsys.readouterr().err
    assert error.startswith("vitdistill") and error.count("\n") == 1, error
    assert tree(here) == before


def test_damage_is_named(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["label", "prune", "labels/teacher", "--to", str(tmp_path / "copy"), "--views", "1"])
        == 0
    )
    part = LabelStore.open(tmp_path / "copy").part_path(0, 0)
    data = bytearray(part.read_bytes())
    data[17] ^= 1
    part.write_bytes(data)
    capsys.readouterr()
    assert main(["label", "verify", str(tmp_path / "copy")]) == DATA
    out, error = capsys.readouterr()
    assert "1 file is damaged" in out and part.name in out
    assert (
        f"1 file of {tmp_path / 'copy'} is not as it was written: delete it and run vitdistill"
        " label again" in error
    )
    (part.parent / "notes.txt").touch()
    assert main(["label", "verify", str(tmp_path / "copy")]) == DATA
    out, error = capsys.readouterr()
    assert (
        "2 files are damaged" in out
        and "are not as they were written: delete them and run" in error
    )
