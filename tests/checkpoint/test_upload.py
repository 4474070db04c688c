"""What a token may do, from what the Hub says about it."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from huggingface_hub import constants

from gptq_cli.checkpoint import upload
from gptq_cli.checkpoint.upload import reads_only
from gptq_cli.results.push import PushConfig


def token(role: str, **more: Any) -> dict[str, Any]:
    return {"name": "me", "auth": {"type": "access_token", "accessToken": {"role": role, **more}}}


def scoped(*permissions: str) -> dict[str, Any]:
    return {"fineGrained": {"global": [], "scoped": [{"entity": {"name": "me"}, "permissions": permissions}]}}


@pytest.mark.parametrize(
    "user",
    [
        token("write"),
        token("fineGrained", **scoped("repo.content.read", "repo.write")),
        token("fineGrained"),
        {"name": "me"},
        {"name": "me", "auth": None},
    ],
)
def test_it_may_write_or_nothing_is_said(user: dict[str, Any]) -> None:
    assert not reads_only(user)


@pytest.mark.parametrize("user", [token("read"), token("fineGrained", **scoped("repo.content.read"))])
def test_it_only_reads(user: dict[str, Any]) -> None:
    assert reads_only(user)


def test_a_token_that_cannot_be_read_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed() -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/closed/token")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(upload, "get_token", closed)
    assert "Permission denied: '/closed/token'" in upload.look(PushConfig(repo_id="me/model")).unreachable
