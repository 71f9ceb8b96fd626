"""Nine small runs compute what they computed when oracle.json was written: see oracle.py."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.whole

ORACLE = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("oracle.py"))))
RECORDED = json.loads(ORACLE.RECORDED.read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ORACLE.compute(tmp_path_factory.mktemp("oracle"))


@pytest.mark.parametrize("name", RECORDED["runs"])
def test_a_run_computes_what_it_computed(name: str, found: dict[str, Any]) -> None:
    """To the last bit on a machine like the recorded one; elsewhere within rounding."""
    recorded = RECORDED["runs"][name]
    assert found[name]["losses"] == pytest.approx(recorded["losses"], rel=1e-3)
    if ORACLE.machine() == RECORDED["machine"]:
        assert found[name]["digest"] == recorded["digest"]


def test_every_run_is_recorded(found: dict[str, Any]) -> None:
    assert found.keys() == RECORDED["runs"].keys()
