"""The planted faults can be planted: `mutants.py` itself tells which the tests notice."""

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.mark.whole
def test_the_code_of_every_planted_fault_stands_once_and_its_tests_exist() -> None:
    file = Path(__file__).with_name("mutants.py")
    spec = importlib.util.spec_from_file_location("mutants", file)
    assert spec is not None and spec.loader is not None
    module = sys.modules["mutants"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.read_mutants(file.with_suffix(".txt").read_text())
    assert len(found) > 60
    for mutant in found:
        assert len([*module.places(mutant, file.parents[1] / "vitdistill")]) == 1, mutant.name
        for pattern in mutant.tests.split()[1:]:
            assert any(file.parent.glob(pattern)), mutant.tests
