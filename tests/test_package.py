"""The package as it is installed: extras only where they are used, pinned versions with digests."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

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


@pytest.mark.whole
def test_public_names_are_imported_when_they_are_used() -> None:
    code = (
        "import sys, vitdistill; assert 'torch' not in sys.modules;"
        "print([getattr(vitdistill, name).__name__ for name in vitdistill._HOMES])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == str([*vitdistill._HOMES])
