"""Whatever numbers a report that is read back holds, its table, its page and its document can be made."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from gptq_cli.cli.report import _drawn, _table
from gptq_cli.display.escapes import json_line
from gptq_cli.results.document import SCHEMA_VERSION, document
from gptq_cli.results.load import LoadReport
from gptq_cli.results.reading import read_document
from gptq_cli.results.run import RunReport
from tests.report.pages import full_report, measured_load


def numbers(held: Any) -> Iterator[tuple[Any, Any]]:
    """(object or list, key) of every number; of a list of objects those in the first one."""
    pairs = list(held.items() if isinstance(held, dict) else enumerate(held))
    for key, value in pairs if isinstance(held, dict) else pairs[:1]:
        if isinstance(value, dict | list):
            yield from numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield held, key


@pytest.mark.parametrize("odd", [None, 0, 1e300, 2**63 - 1, 5e-324], ids=str)
@pytest.mark.parametrize("made", [full_report(), measured_load()], ids=["run", "load"])
def test_any_number_can_be_shown(made: RunReport | LoadReport, odd: float | None) -> None:
    held = json.loads(json.dumps(document(made)))
    del held["schema_version"]
    for place, key in list(numbers(held)):
        before, place[key] = place[key], odd
        try:
            read = read_document(type(made), held | {"schema_version": SCHEMA_VERSION})
        except ValueError as error:
            assert f" is {odd!r}; expected: " in str(error)  # noqa: PT017  # a count is no fraction
        else:
            Console(file=io.StringIO(), width=100).print(_table(read))
            assert _drawn(read).endswith("</html>\n")
            json_line(document(read))
        place[key] = before
