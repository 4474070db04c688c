"""What a command says as a document when it fails, in place of its result."""

from __future__ import annotations

from dataclasses import dataclass

from gptq_cli.findings import Finding


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureFacts:
    """Why a command failed."""

    type: str
    """The class of the error: `ConfigError`, `PreflightRefused`, `UsageError`, `Interrupted`, …"""
    message: str
    hint: str | None
    """What to do next."""
    exit_code: int
    findings: tuple[Finding, ...] | None = None
    """Of a job that preflight refused; null for every other error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureReport:
    """The document of a command that failed."""

    error: FailureFacts
