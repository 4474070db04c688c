"""`gptq push DIR ID`: verify a finished checkpoint and upload it to the Hub."""

from __future__ import annotations

import typer

from gptq_cli.cli import options as o
from gptq_cli.cli.output import Session, show, watch
from gptq_cli.results.push import PushConfig


def push(
    context: typer.Context,
    path: o.Checkpoint,
    repo_id: o.RepoId,
    *,
    private: o.Private = False,
    as_json: o.Json = False,
    progress: o.Progress = "auto",
    log_file: o.LogFile = None,
    events: o.EventsFile = None,
    quiet: o.Quiet = False,
) -> None:
    """Verify the GPTQ checkpoint DIR and upload it to the Hub as ID, in one commit.

    The same command goes on after an interruption. report.json and pages name this machine: they stay here.
    """
    session: Session = context.obj
    with watch(session, progress, quiet=quiet) as observer:
        from gptq_cli import jobs

        report = jobs.push(path, PushConfig(repo_id=repo_id, private=private), observer)

    from gptq_cli.display.load import push_summary

    show(session, report, push_summary)
