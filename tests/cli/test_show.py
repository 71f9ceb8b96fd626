"""``vitdistill show``: a sheet with a row for each way to look, and what networks say of it."""

import contextlib
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.home import CONFIG, DATA, NETWORK, SHORT, make_home, run, tree
from vitdistill.recipes.yaml import load_recipe
from vitdistill.report.answers import read_answers
from vitdistill.report.show import show
from vitdistill.world import ALONE

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, its student under MaskedKD, and a masked autoencoder."""
    root = make_home(tmp_path_factory.mktemp("home"))
    with contextlib.chdir(root):
        taught = f"--output runs/masked {SHORT} --teacher-model runs/teacher"
        assert run(f"train small_images_maskedkd {taught} --keep-rate 0.5") == 0
        assert run(f"train small_images_mae --output runs/mae {SHORT}") == 0
        stored = f"small_images_kd {SHORT} --output"
        assert run(f"label {stored} labels --teacher-model runs/teacher/last") == 0
        assert run(f"train {stored} runs/stored --labels labels") == 0
        assert run("report runs --ask --device cpu --output page.html") == 0
    return root


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


@pytest.mark.parametrize("name", ["masked", "stored"])
def test_what_is_shown_is_what_the_networks_answer(here: Path, name: str) -> None:
    images = sorted(Path("photos/val").rglob("*.png"))[::7]
    shown = show(Path("runs", name), images, ALONE)
    answers = read_answers(Path("runs", name))
    assert not shown.notes
    assert answers is not None
    order = sorted(Path("photos/val").rglob("*.png"))
    for path, words in zip(images, shown.said, strict=True):
        i = order.index(path)
        assert words["student"][0].startswith(f"{answers.classes[answers.student[i]]} ")
        assert words["teacher"][0].startswith(f"{answers.classes[answers.teachers['teacher'][i]]} ")


@pytest.mark.parametrize(("name", "rows"), [("teacher", 2), ("masked", 3), ("mae", 4)])
def test_a_sheet_has_a_row_for_each_way_to_look(here: Path, name: str, rows: int) -> None:
    images = sorted(Path("photos/val").rglob("*.png"))[:3]
    before = tree(here)
    words = " ".join(map(str, images))
    assert run(f"show runs/{name} {words} --output sheet.png --device cpu") == 0
    with Image.open("sheet.png") as sheet:
        height = rows * 102 + 6
        assert sheet.width == 130 + 3 * 102
        assert sheet.height == height if name == "mae" else sheet.height > height
        columns = [130 + i * 102 for i in range(3)]
        shown = [
            {sheet.getpixel((x + dx, 30 + 102 * r)) for x in columns for dx in (5, 50, 90)}
            for r in range(rows)
        ]
    assert all(len(pixels) > 1 for pixels in shown), "no row is blank"
    Path("sheet.png").unlink()
    assert tree(here) == before


def test_more_images_than_a_screen_is_wide_are_below_each_other(here: Path) -> None:
    images = sorted(Path("photos/val").rglob("*.png"))[:12]
    once = show(Path("runs/masked"), images, ALONE).sheet
    thrice = show(Path("runs/masked"), images * 3, ALONE).sheet
    assert thrice.width == once.width <= 1400 and thrice.height == 3 * once.height
    for top in (0, once.height, 2 * once.height):
        assert thrice.crop((0, top, once.width, top + once.height)).tobytes() == once.tobytes()


def test_of_a_teacher_that_is_gone_is_said_what_its_labels_say(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("runs/teacher").rename("gone")
    try:
        assert run("show runs/stored photos/val/red/00.png --device cpu") == 0
        said = capsys.readouterr().out
        proof = re.search(r"labels/teacher.*vit_tiny_patch16_224.* of 60 validation", said)
        assert proof is not None and ".png: teacher: " not in said
        assert run("show runs/masked photos/val/red/00.png --device cpu") == CONFIG
    finally:
        Path("gone").rename("runs/teacher")
        Path("show.png").unlink()


def test_a_folder_of_stages_says_which_of_them_is_shown(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    each = ["train.epochs=1", "train.batch_size=12", "optim.warmup_epochs=0"]
    both = " ".join(f"{stage}.{setting}" for stage in ("pretrain", "finetune") for setting in each)
    args = f"--set 'pretrain.student.model_args={NETWORK}' {both}"
    words = (
        f"train small_images_mae_finetuned --data-dir photos --device cpu --output runs/two {args}"
    )
    assert run(words) == 0
    capsys.readouterr()
    assert run("show runs/two photos/val/red/00.png --device cpu") == 0
    said = capsys.readouterr().out
    assert "runs/two/finetune" in said and "runs/two/pretrain" in said
    assert run("show runs/two/pretrain photos/val/red/00.png --device cpu") == 0
    assert "runs/two/finetune" not in capsys.readouterr().out


def test_what_cannot_be_shown_is_refused(here: Path, tmp_path: Path) -> None:
    image = "photos/val/red/00.png"
    (tmp_path / "damaged.png").write_bytes(Path(image).read_bytes()[:60])
    before = tree(here)
    assert run(f"show runs/teacher {tmp_path}/damaged.png --device cpu") == DATA
    assert run(f"show runs/teacher {tmp_path}/none.png --device cpu") == DATA
    assert run(f"show photos {image} --device cpu") == CONFIG
    Path("runs/begun").mkdir()
    Path("runs/begun/recipe.yaml").write_bytes(Path("runs/teacher/recipe.yaml").read_bytes())
    assert load_recipe("runs/begun/recipe.yaml").name == "teacher"
    assert run(f"show runs/begun {image} --device cpu") == CONFIG
    Path("runs/begun/recipe.yaml").unlink()
    Path("runs/begun").rmdir()
    assert tree(here) == before
