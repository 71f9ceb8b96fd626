"""Who wrote a file, and whether that process can still be alive."""

import json
import os
import socket
import subprocess
import sys

import pytest

from vitdistill.storage import processes

OUTSIDE = "pid:[4026531836]"


def boot() -> str:
    return processes.space().partition(" ")[0]


def gone() -> int:
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_process_is_alive_until_it_is_gone():
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            (
                "import json; from vitdistill.storage import processes as p;"
                " print(json.dumps(p.this_process())); input()"
            ),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None and child.stdout is not None
    owner = json.loads(child.stdout.readline())
    assert owner["pid"] == child.pid and owner["host"] == socket.gethostname()
    assert not processes.is_dead(owner) and not processes.is_dead(processes.this_process())
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert processes.is_dead(owner), "a zombie is dead"
    child.communicate()
    assert processes.is_dead(owner)


@pytest.mark.parametrize(
    ("changes", "dead"),
    [
        ({}, False),
        ({"started": "1"}, True),  # the number is used again, by this very process
        ({"pid": 2**22 + 1}, True),
        ({"pid": 10**30}, True),
        ({"pid": 2**22 + 1, "host": "elsewhere"}, False),
        ({"pid": 2**22 + 1, "space": f"{boot()} pid:[17]"}, False),  # another container
        ({"pid": 2**22 + 1, "space": "another-boot pid:[17]"}, False),
        ({"pid": 2**22 + 1, "space": ""}, processes.space() == ""),
        ({"pid": 0}, False),
        ({"pid": -1}, False),
    ],
)
def test_only_what_is_gone_for_certain_is_dead(changes, dead):
    assert processes.is_dead({**processes.this_process(), **changes}) == dead


def test_after_a_restart_what_was_in_no_container_is_gone():
    """Seen from a container, that process was on this host or on another one of its name."""
    owner = {**processes.this_process(), "space": f"another-boot {OUTSIDE}"}
    assert processes.is_dead(owner) == processes.space().endswith(OUTSIDE)


def test_claims_of_earlier_versions_are_understood():
    """They have the boot in the start time, and no container."""
    mine = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": f"{boot()} {processes.started(os.getpid())}",
    }
    assert not processes.is_dead(mine)
    assert not processes.is_dead({**mine, "started": None})  # where the system says no time
    assert processes.is_dead({**mine, "started": "another-boot 123"})
    assert processes.is_dead({**mine, "pid": gone()})
    assert not processes.is_dead({**mine, "pid": 2**22 + 1, "host": "elsewhere"})
    for field in mine:
        with pytest.raises(KeyError):
            processes.is_dead({key: value for key, value in mine.items() if key != field})
