"""The files beside a display: every event, the time of day, the error at the end."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path

import pytest

from gptq_cli.display.plain import lines
from gptq_cli.display.recorded import Recorder, recorders
from gptq_cli.errors import ConfigError
from tests.display.events import sample_run


def test_a_log_file_has_the_lines_of_the_plain_display_with_the_time_of_day(tmp_path: Path) -> None:
    (record,) = recorders(str(tmp_path / "run.log"), None)
    for _, event in sample_run(1):
        record(event)
    record.log("a library\x1b[2J speaks")
    record.failed(ConfigError("bits is 5"))
    record.close()
    written = (tmp_path / "run.log").read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\] (.*)", line) for line in written]
    assert all(found)
    words = [match[2] for match in found if match]
    assert words[:-2] == [line for _, event in sample_run(1) for line in lines(event)]
    assert words[-2:] == ["a library\\x1b[2J speaks", "error: bits is 5"]


def test_an_events_file_has_every_event(tmp_path: Path) -> None:
    (record,) = recorders(None, str(tmp_path / "run.jsonl"))
    for _, event in sample_run(1):
        record(event)
    record.failed(ConfigError("bits is 5"))
    record.close()
    found = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [one["event"] for one in found[:-1]] == [type(event).__name__ for _, event in sample_run(1)]
    assert found[-1]["type"] == "ConfigError"
    assert all(datetime.fromisoformat(one["time"]).tzinfo is not None for one in found)


def test_a_second_run_is_appended(tmp_path: Path) -> None:
    for words in ("one", "two"):
        (record,) = recorders(str(tmp_path / "run.log"), None)
        record.log(words)
        record.close()
    assert [line.rpartition(" ")[2] for line in (tmp_path / "run.log").read_text().splitlines()] == [
        "one",
        "two",
    ]


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"log_file is .*which cannot be written"):
        recorders(str(tmp_path), None)
    with pytest.raises(ConfigError, match=r"events is .*no such file"):
        recorders(None, str(tmp_path / "a" / "b"))
    with pytest.raises(ConfigError, match="are both"):
        recorders(str(tmp_path / "x"), str(tmp_path / "." / "x"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
def test_a_full_disk_does_not_end_the_work() -> None:
    record = Recorder(Path("/dev/full"), "log_file", as_json=False)
    record.log("a line")
    record.log("another")
    record.close()
    assert record.failure is not None
    assert record.failure.errno == 28
