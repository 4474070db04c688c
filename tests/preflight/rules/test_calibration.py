"""What stands against a model that writes its own text: no room for it as a whole; and a long time."""

from __future__ import annotations

import pytest

from gptq_cli.placement.device import CPU
from gptq_cli.planning.cases import DeviceNeed
from gptq_cli.preflight.rules.calibration import (
    LONG_SECONDS,
    WindowsCase,
    WritingCase,
    no_chat_template,
    own_text_memory,
    own_text_time,
    table_as_text,
)

GIB = 1 << 30


def case(seconds: float | None = None, **needed: int) -> WritingCase:
    needs = tuple(DeviceNeed(device, size, 4 * GIB) for device, size in needed.items())
    return WritingCase(tokens=262144, device=CPU, needs=needs, seconds=seconds)


def test_every_device_without_room_is_named() -> None:
    assert own_text_memory(case(cpu=4 * GIB)) == []
    (found,) = own_text_memory(case(cpu=GIB, other=9 * GIB))
    assert (found.level, found.subject) == ("error", "other")
    assert "other needs 9.00 GiB of 4.00 GiB" in found.message
    assert "--calibration pydoc" in found.hint


@pytest.mark.parametrize(("seconds", "found"), [(None, 0), (LONG_SECONDS - 1, 0), (LONG_SECONDS + 60, 1)])
def test_a_long_time_is_a_warning(seconds: float | None, found: int) -> None:
    remarks = own_text_time(case(seconds))
    assert len(remarks) == found
    for remark in remarks:
        assert remark.level == "warning"
        assert "262144 tokens of text on cpu first, about 11 min" in remark.message
        assert "--calibration self*0.25" in remark.hint


@pytest.mark.parametrize(
    ("table", "hint"),
    [
        ("JSON lines", "ends in .jsonl; a column is named after a colon: FILE.jsonl:COLUMN"),
        ("JSON", "ends in .json; a column is named after a colon: FILE.json:COLUMN"),
        ("comma-separated values", "pandas.read_csv"),
    ],
)
def test_a_table_that_is_read_as_plain_text_is_a_warning(table: str, hint: str) -> None:
    assert table_as_text(WindowsCase(source="a.txt")) == []
    (found,) = table_as_text(WindowsCase(source="a.txt", table=table))
    assert (found.level, found.subject) == ("warning", "a.txt")
    assert f"looks like {table}, and is read as plain text" in found.message
    assert hint in found.hint


def test_conversations_without_a_template_are_a_warning() -> None:
    assert no_chat_template(WindowsCase(source="a.jsonl", joined=0)) == []
    (found,) = no_chat_template(WindowsCase(source="a.jsonl", joined=1))
    assert (found.level, found.subject) == ("warning", "a.jsonl")
    assert "no chat template: 1 conversation is read" in found.message
    assert "chat_template.jinja" in found.hint
