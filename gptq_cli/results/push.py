"""An upload to the Hub: what is known about it before the work, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PushConfig:
    """Where a checkpoint is to be uploaded."""

    repo_id: str
    """`user/name` on the Hub."""
    private: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HubState:
    """The Hub as an upload would find it. What follows on the first problem was not looked up."""

    repo_id: str
    private: bool
    """What was asked for."""
    invalid: str = ""
    """Why the id is none."""
    offline: bool = False
    has_token: bool = True
    read_only: bool = False
    """The token may read the Hub and not write to it."""
    unreachable: str = ""
    """What was said by the network, or by the Hub about the token."""
    namespaces: tuple[str, ...] = ()
    """The user and organisations that the token belongs to."""
    exists: bool = False
    is_private: bool = False
    holds_other_weights: bool = False
    """The repository has weights, and they are not those of a GPTQ checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushReport:
    """The result of an upload."""

    path: str
    repo_id: str
    private: bool
    url: str
    """Of the commit."""
    seconds: float
