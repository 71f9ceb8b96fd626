"""The package as it is installed: extras only where they are used, pinned versions with digests."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata

import vitdistill

ROOT = Path(__file__).parents[1]

# Imports every module where what only the extras bring is nowhere to be found.
IMPORT_ALL = """
import importlib, importlib.machinery, pkgutil, sys

class Installed(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in sys.argv[1:] else super().find_spec(name, path, target)

sys.meta_path = [Installed if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
import vitdistill
for module in pkgutil.walk_packages(vitdistill.__path__, "vitdistill."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""
ONLY_IN_EXTRAS = (
    *("sklearn", "scipy", "matplotlib", "pyarrow", "datasets", "pandas", "tensorboard"),
    *("onnx", "onnxscript", "onnxruntime", "beartype", "hypothesis", "pytest"),
)


@pytest.mark.whole
def test_every_module_imports_without_the_extras() -> None:
    command = [sys.executable, "-W", "error", "-c", IMPORT_ALL, *ONLY_IN_EXTRAS]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_version_is_said_once() -> None:
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert described["project"]["version"] == vitdistill.__version__


def test_pinned_versions_have_digests_and_no_addresses() -> None:
    text = (ROOT / "requirements" / "constraints.txt").read_text()
    assert "://" not in text and not re.search(r"^\s*-(i|f|-\w)", text.replace("--hash", ""), re.M)
    entries = [part for part in re.split(r"^(?=[^\s#])", text, flags=re.M) if "==" in part]
    assert len(entries) > 50
    for entry in entries:
        first = entry.partition("\n")[0]
        assert re.match(r"[a-z0-9.-]+==\S+", entry) and "+cpu" not in first, first
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), first


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy: setuptools writes beside what it builds."""
    place = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "vitdistill", place / "vitdistill", ignore=ignored)
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    (place / "dist").mkdir()
    subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, check=True)
    return zipfile.ZipFile(next((place / "dist").glob("*.whl")))


@pytest.mark.whole
def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = (path for path in (ROOT / "vitdistill").rglob("*") if path.is_file())
    assert names == {str(p.relative_to(ROOT)) for p in files if "__pycache__" not in p.parts}
    assert {"vitdistill/py.typed", "vitdistill/report/style.css"} <= names
    about = {name.partition("/")[2]: wheel.read(name).decode() for name in wheel.namelist()}
    assert about["licenses/LICENSE"] == (ROOT / "LICENSE").read_text()
    assert "vitdistill = vitdistill.cli:main" in about["entry_points.txt"]


@pytest.mark.whole
def test_the_wheel_describes_itself(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    found = Metadata.from_email(wheel.read(name), validate=True)
    assert (found.name, str(found.version)) == ("vitdistill", vitdistill.__version__)
    assert found.license_expression == "Apache-2.0" and found.license_files == ["LICENSE"]
    assert found.description == (ROOT / "README.md").read_text()
    assert found.description_content_type == "text/markdown"
    needed = {need.name for need in found.requires_dist or () if need.marker is None}
    assert needed == {*imported_packages()}, "what is imported is asked for"


def imported_packages() -> set[str]:
    """The packages that modules import when they are imported, by their names in the index."""
    found = set()
    for path in (ROOT / "vitdistill").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.partition(".")[0])
    found -= {*sys.stdlib_module_names, "vitdistill"}
    names = {"PIL": "pillow", "ruamel": "ruamel.yaml"}
    # The first is timm's own need, the second Jinja2's.
    return {names.get(name, name) for name in found} - {"huggingface_hub", "markupsafe"}


@pytest.mark.whole
def test_public_names_are_imported_when_they_are_used() -> None:
    code = (
        "import sys, vitdistill; assert 'torch' not in sys.modules;"
        "print([getattr(vitdistill, name).__name__ for name in vitdistill._HOMES])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == str([*vitdistill._HOMES])
