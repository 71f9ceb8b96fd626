"""Logs keep whole lines, and a resumed run's are not there twice."""

import json
import resource
from contextlib import closing

import pytest

from vitdistill.errors import DataError, DiskError
from vitdistill.storage.log import AppendLog


def test_a_log_is_cut_back_to_its_checkpoint(tmp_path):
    path = tmp_path / "logs" / "metrics.jsonl"
    with closing(AppendLog(path)) as log:
        log.append('{"step": 1}')
        offset = log.sync()
        log.append('{"step": 2}')
    with closing(AppendLog(path, offset)) as log:
        log.append('{"step": 2, "again": true}')
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    assert "again" in path.read_text()
    for wrong in (10**6, offset - 3):
        with pytest.raises(DataError):
            AppendLog(path, wrong)
    assert path.stat().st_size == 39


def test_a_full_disk_leaves_whole_lines_in_the_log(tmp_path, fork, join):
    path = tmp_path / "log"

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        log = AppendLog(path)
        with pytest.raises(DiskError):
            for _ in range(100):
                log.append("x" * 29)

    assert join(fork(write)) == 0
    assert path.read_bytes() == (b"x" * 29 + b"\n") * 33
