"""What the tests' own way to run a command does with Ctrl-C."""

from __future__ import annotations

import pytest

from tests.e2e import commands


def test_ctrl_c_ends_the_test_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` answers a KeyboardInterrupt with 130, and the next test would start."""
    monkeypatch.setattr(commands, "main", lambda words: 130 if words == ["quantize"] else 0)
    with pytest.raises(KeyboardInterrupt):
        commands.gptq("quantize")
    assert commands.gptq("quantize", interrupted=True).code == 130
    assert commands.gptq("load").code == 0
