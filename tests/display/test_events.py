"""The synthetic events show what the product can say: rules that exist, with the levels that exist."""

from __future__ import annotations

import pytest

from gptq_cli.findings import Finding
from gptq_cli.preflight.registry import RULES
from tests.display import events, map_reports

FINDINGS = [
    *(value for value in vars(events).values() if isinstance(value, Finding)),
    *(finding for report in (map_reports.fits(), map_reports.refused()) for finding in report.findings),
]


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: finding.rule)
def test_every_rule_exists(finding: Finding) -> None:
    assert finding.rule in RULES


def test_there_are_findings_of_every_level() -> None:
    assert {finding.level for finding in FINDINGS} == {"error", "warning", "note"}
