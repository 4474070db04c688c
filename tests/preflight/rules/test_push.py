"""What stands against an upload, of what the Hub said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gptq_cli.preflight.rules import push as rules_push
from gptq_cli.results.push import HubState
from gptq_cli.rules import rules_in

FREE = HubState(repo_id="me/model", private=False, namespaces=("me", "team"))


def found(state: HubState) -> list[str]:
    return [finding.rule for one in rules_in(rules_push) for finding in one(state)]


@pytest.mark.parametrize(
    "state",
    [
        FREE,
        replace(FREE, repo_id="team/model"),
        replace(FREE, exists=True),
        replace(FREE, exists=True, repo_id="other/model"),
        replace(FREE, exists=True, private=True, is_private=True),
    ],
)
def test_nothing_stands_against_it(state: HubState) -> None:
    assert found(state) == []


@pytest.mark.parametrize(
    ("state", "rule"),
    [
        (replace(FREE, invalid="too long"), "push-id"),
        (replace(FREE, offline=True), "push-offline"),
        (replace(FREE, has_token=False), "push-token"),
        (replace(FREE, read_only=True), "push-read-only"),
        (replace(FREE, unreachable="401"), "push-unreachable"),
        (replace(FREE, repo_id="other/model"), "push-namespace"),
        (replace(FREE, exists=True, private=True), "push-visibility"),
        (replace(FREE, exists=True, holds_other_weights=True), "push-other-model"),
    ],
)
def test_what_stands_against_it(state: HubState, rule: str) -> None:
    assert found(state) == [rule]
