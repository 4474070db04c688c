"""`gptq doctor` on a machine where something cannot be read."""

from __future__ import annotations

import errno

import huggingface_hub
import pytest
from huggingface_hub import constants

from gptq_cli.jobs.doctor import doctor


def test_a_token_in_a_closed_directory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed() -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/closed/token")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/closed/token")
    monkeypatch.setattr(huggingface_hub, "get_token", closed)
    (hub,) = (check for check in doctor().checks if check.name == "hub")
    assert (hub.found, hub.verdict) == (
        "the token cannot be read: permission denied: /closed/token",
        "warning",
    )
    assert "HF_HOME" in hub.advice
