"""A document is read back as the report that it was made of; what is wrong in it is named."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from gptq_cli.results.document import document
from gptq_cli.results.load import LoadReport, VerifyReport
from gptq_cli.results.reading import read_document
from gptq_cli.results.run import RunReport
from tests.display.events import report, verify_report
from tests.report.pages import expert_report, full_report, measured_load


def written(made: object) -> Any:
    return json.loads(json.dumps(document(made)))


@pytest.mark.parametrize(
    ("kind", "made"),
    [
        (RunReport, report()),
        (RunReport, full_report()),
        (RunReport, expert_report()),
        (LoadReport, measured_load()),
        (VerifyReport, verify_report(sound=False)),
    ],
)
def test_it_is_the_same_report(kind: type, made: object) -> None:
    assert read_document(kind, written(made)) == made


def test_what_json_cannot_hold_is_no_number_again() -> None:
    block = report().blocks[0]
    broken = replace(block, linears=(replace(block.linears[0], loss=math.inf),))
    read = read_document(RunReport, written(replace(report(), blocks=(broken,))))
    assert math.isnan(read.blocks[0].linears[0].loss)


def test_older_documents_get_defaults_and_what_newer_ones_have_besides_is_passed_over() -> None:
    held = written(full_report())
    del held["findings"], held["predicted_seconds"]
    held["blocks"][0]["news"] = [1]
    read = read_document(RunReport, held)
    assert read.findings == ()
    assert read.predicted_seconds is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version is 2; this version reads 1"),
        ({"bits": "4"}, "bits is '4'; expected: a whole number"),
        ({"bits": True}, "bits is True; expected: a whole number"),
        ({"sym": 1}, "sym is 1; expected: true or false"),
        ({"blocks": {}}, None),
        ({"blocks": [{"name": "x"}]}, "blocks[0].seconds is missing"),
        ({"revision": 3}, "revision is 3; expected: a text or null"),
        ({"proof": {"path": "x"}}, "proof.quantizer is missing"),
        ({"phase_seconds": [["a"]]}, "expected: 2 values"),
        ({"findings": [{"rule": "r", "level": "bad"}]}, "findings[0].level is 'bad'; expected: error"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(change: dict[str, Any], message: str | None) -> None:
    held = written(full_report()) | change
    if message is None:
        assert read_document(RunReport, held).blocks == ()
        return
    with pytest.raises(ValueError, match=r"schema_version|expected|missing|level") as caught:
        read_document(RunReport, held)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400, str(2**63)])
@pytest.mark.parametrize("field", ["seconds", "size_after_bytes"])
def test_a_number_that_is_not_finite_is_refused(field: str, text: str) -> None:
    held = written(report()) | {field: json.loads(text)}
    with pytest.raises(ValueError, match=f"^{field} is .*; expected: "):
        read_document(RunReport, held)
