"""What leaves: for timm, for torch.export, for the hub; and what it says of where it comes from."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from ruamel.yaml import YAML
from small_hub import serve_hub
from small_runs import environment

from tests.cli.home import CONFIG, SHORT, make_home, run
from vitdistill.weights.create import create_model
from vitdistill.weights.origin import origin_of

KD = f"train small_images_kd {SHORT} --teacher-model nc --output runs/student"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of a teacher whose weights came under a licence, from a folder of timm's."""
    root = make_home(tmp_path_factory.mktemp("home"))
    shutil.copytree(root / "runs/teacher/best", root / "nc")
    config = json.loads((root / "nc/config.json").read_text())
    del config["vitdistill"]
    config["pretrained_cfg"] |= {"license": "cc-by-nc-4.0", "origin_url": "https://example.org/nc"}
    (root / "nc/config.json").write_text(json.dumps(config))
    here = os.getcwd()
    os.chdir(root)
    try:
        assert run(KD) == 0
    finally:
        os.chdir(here)
    return root


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """``home``, as the current folder; what a test writes into it is removed."""
    monkeypatch.chdir(home)
    yield home
    for entry in home.iterdir():
        if entry.name not in ("photos", "runs", "nc"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def config_of(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "config.json").read_text())
    return found


def test_an_export_says_whose_licences_it_comes_from_and_claims_none(here: Path) -> None:
    assert run("export runs/student --output out --card") == 0
    config = config_of("out")
    assert "license" not in json.dumps(config["pretrained_cfg"])
    (teacher,) = config["vitdistill"]["teachers"].values()
    assert teacher["license"] == "cc-by-nc-4.0" and teacher["url"] == "https://example.org/nc"
    assert len(teacher["network_sha256"]) == 64 and "began_from" not in config["vitdistill"]
    # What learns from that, or begins with it, is told too.
    words = SHORT.partition(" --set")[0] + " --model runs/student --teacher-model runs/student"
    assert run(f"train small_images_kd {words} --output next") == 0
    assert run("export next --output heir") == 0
    record = config_of("heir")["vitdistill"]
    for began in (record["began_from"], record["teachers"]["teacher"]):
        assert began["teachers"]["teacher"] == teacher
        assert "license" not in began and str(here) not in json.dumps(began)


def test_a_card_says_where_weights_come_from(here: Path) -> None:
    assert run("export runs/student --output out --card") == 0
    text = Path("out/README.md").read_text()
    _, front, body = text.split("---\n", 2)
    about = YAML(typ="safe").load(front)
    assert about["library_name"] == "timm" and "license" not in about
    summary = json.loads(Path("runs/student/summary.json").read_text())
    (metric,) = about["model-index"][0]["results"][0]["metrics"]
    assert metric["value"] == pytest.approx(summary["best_top1"], abs=1e-4)
    for said in (
        "cc-by-nc-4.0",
        "## Data",
        "photos",
        "## Method",
        "kd",
        "## Cost",
        "for the whole training",
    ):
        assert said in body
    assert str(here) not in text and "initial weights" in body
    code, found = body.split("```python\n")[1].split("```")[0], {}
    exec(code, found)
    assert found["model"].num_classes == 3 and not found["model"].training
    assert found["transform"](Image.new("RGB", (20, 30))).shape == (3, 16, 16)


def test_a_card_names_images_without_labels_but_not_their_place(here: Path) -> None:
    shutil.copytree("runs/student", "mixed")
    recipe = Path("mixed/recipe.yaml")
    recipe.write_text(recipe.read_text().replace("unlabelled: null", "unlabelled: /disk/more"))
    assert run("export mixed --output out --card") == 0
    text = Path("out/README.md").read_text()
    assert text.count("photos, and without labels more") == 2 and "/disk" not in text


def test_what_is_known_of_a_teachers_licence() -> None:
    """A file's is not that of timm's weights of the same name; a card tells both."""
    found = origin_of("vit_small_patch16_dinov3", "mine/dino.safetensors")
    assert found == {
        "model": "vit_small_patch16_dinov3",
        "weights": "dino.safetensors",
        "registry_license": "dinov3-license",
    }
    assert origin_of("vit_small_patch16_dinov3") is None
    downloaded = origin_of("vit_small_patch16_dinov3.lvd1689m", pretrained=True)
    assert downloaded is not None and downloaded["license"] == "dinov3-license"
    assert downloaded["weights"] == "timm/vit_small_patch16_dinov3.lvd1689m"


@pytest.mark.whole
@pytest.mark.parametrize("kind", ["best", "last"])
def test_the_weights_that_are_asked_for(
    here: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"best": "last", "last": "best"}[kind]
    shutil.copytree("runs/student", "copy")
    shutil.rmtree(f"copy/{other}")
    shutil.copytree("runs/teacher/last", f"copy/{other}")
    assert run(f"export copy --weights {kind} --output out") == 0
    assert f"copy/{kind}" in capsys.readouterr().out
    exported, there = create_model("out"), create_model(f"copy/{kind}")
    pairs = zip(exported.parameters(), there.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert run(f"export copy/best --weights {kind} --output again") == CONFIG
    assert run("export runs/student --card --onnx x.onnx") == CONFIG
    assert run("export runs/student --private --onnx x.onnx") == CONFIG


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore")
def test_a_torch_export_file_answers_the_same_for_any_batch(here: Path) -> None:
    assert run("export runs/student --pt2 student.pt2") == 0
    about = {"about.json": ""}
    program = torch.export.load("student.pt2", extra_files=about).module()
    found = json.loads(about["about.json"])
    assert found["classes"] == ["blue", "green", "red"] and found["image_size"] == [16, 16]
    assert found["vitdistill"]["teachers"]["teacher"]["license"] == "cc-by-nc-4.0"
    model = create_model("runs/student/best").eval()
    for size in (1, 2, 5):
        images = torch.randn(size, 3, 16, 16)
        assert torch.allclose(program(images), model(images), atol=1e-5)


def push(words: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own: where the hub is, its client reads when imported."""
    command = [sys.executable, "-m", "vitdistill", "export", "runs/student", *words.split()]
    env = {**environment(), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **changes}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)


@pytest.mark.whole
def test_pushing_to_a_hub(here: Path) -> None:
    with serve_hub() as hub:
        env = {"HF_ENDPOINT": hub.address, "HF_HOME": str(here / "cache")}
        refused = push("--push org/student", **env)
        assert refused.returncode == CONFIG and "Traceback" not in refused.stderr
        assert "401" in refused.stderr and not hub.files
        done = push("--push org/student --private", HF_TOKEN="secret", **env)
        assert done.returncode == 0, done.stderr
        assert hub.private and "hf-hub:org/student" in done.stdout
        assert {*hub.files} == {"README.md", "config.json", "model.safetensors"}
        hub.files["README.md"] = b"mine"
        assert push("--push org/student", HF_TOKEN="secret", **env).returncode == 0
        assert hub.files["README.md"] == b"mine"
    Path("there").mkdir()
    for name, content in hub.files.items():
        Path("there", name).write_bytes(content)
    config, images = config_of("there"), torch.randn(2, 3, 16, 16)
    assert "license" not in config["pretrained_cfg"]
    assert config["vitdistill"]["teachers"]["teacher"]["license"] == "cc-by-nc-4.0"
    theirs = timm.create_model("local-dir:there", pretrained=True).eval()
    ours = create_model("runs/student/best").eval()
    assert torch.equal(theirs(images), ours(images))
    assert theirs.pretrained_cfg["label_names"] == ["blue", "green", "red"]
    gone = push("--push org/student", HF_TOKEN="secret", **env)
    assert gone.returncode == CONFIG and "Traceback" not in gone.stderr
