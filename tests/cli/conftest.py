"""Run a command in this process against pretended jobs: no torch, no model, no second."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

import gptq_cli
from gptq_cli.cli.app import main
from gptq_cli.events import Observer
from tests.display.events import load_report, report
from tests.display.map_reports import fits, planned


@dataclass
class FakeJobs:
    """Stands in for `gptq_cli.jobs`: remembers the job, does what `action` says, returns a report."""

    action: Callable[[Observer], Any] = lambda observer: None
    job: Any = None
    called: str = ""
    more: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(
        default_factory=lambda: {
            "quantize": report(),
            "dry_run": planned(),
            "load": load_report(),
            "inspect_map": fits(),
        }
    )

    def _run(self, name: str, job: Any, observer: Observer, **more: Any) -> Any:
        self.called, self.job, self.more = name, job, more
        self.action(observer)
        return self.results[name]

    def module(self) -> SimpleNamespace:
        """The functions under their names."""
        return SimpleNamespace(
            **{
                name: lambda job, observer, name=name, **more: self._run(name, job, observer, **more)
                for name in self.results
            }
        )


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the machine that runs the tests leaks into a command."""
    import os

    for name in list(os.environ):
        if name.startswith("GPTQ_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> FakeJobs:
    """The pretended jobs; commands find them where the real ones are."""
    fake = FakeJobs()
    module = fake.module()
    monkeypatch.setitem(sys.modules, "gptq_cli.jobs", module)
    monkeypatch.setattr(gptq_cli, "jobs", module, raising=False)
    return fake


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("quantize", "MODEL", …)` -> exit code, stdout, stderr."""

    def call(*argv: str) -> Outcome:
        capsys.readouterr()
        code = main(list(argv))
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call
