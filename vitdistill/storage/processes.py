"""Which process a file is from: its host, the boot and container its number counts in, the number,
and when it was started.
"""

import os
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_OUTSIDE = (  # the namespace of all processes that are in no container; a constant of Linux
    "pid:[4026531836]"
)


def this_process() -> dict[str, Any]:
    """Who this process is, as plain JSON for a file that says so."""
    return {
        "host": socket.gethostname(),
        "space": space(),
        "pid": os.getpid(),
        "started": started(os.getpid()),
    }


def is_dead(owner: Mapping[str, Any]) -> bool:
    """Whether the process of which `this_process` gave ``owner`` is gone for certain.

    Its number means something on its own host and in its own container alone: in any other it may
    be alive, whatever is alive here. Of a host that was started again since, only the processes
    outside of containers are known to be gone: a container can be on another machine under the same
    name.

    Raises:
        KeyError, TypeError, ValueError: ``owner`` is something else.
    """
    if owner["host"] != socket.gethostname():
        return False
    pid, then, here = int(owner["pid"]), owner["started"], space()
    if pid <= 0:
        return False
    if "space" not in owner:  # a claim of an earlier version, with the boot in the start time
        now = started(pid)
        return now is None or then not in (None, f"{here.partition(' ')[0]} {now}")
    if owner["space"] != here:
        return str(owner["space"]).endswith(_OUTSIDE) and here.endswith(_OUTSIDE)
    return started(pid) != then


def space() -> str:
    """Within which process numbers name processes: this boot, and this container; "" where the
    system does not say.
    """
    with suppress(OSError):
        return (
            f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
            f" {os.readlink('/proc/self/ns/pid')}"
        )
    return ""


def started(pid: int) -> str | None:
    """When a process was started, because numbers are used again; None when it is dead, "" where
    the system does not say.
    """
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass
    with suppress(OSError):
        state, *fields = re.sub(
            r".*\)", "", Path(f"/proc/{pid}/stat").read_text(), flags=re.DOTALL
        ).split()
        # A zombie is dead already; its parent has not noticed yet.
        return None if state in "ZX" else fields[18]
    return ""
