"""`gptq rules`, `targets`, `recipes` and `doctor`: what there is, and what this machine is like."""

from __future__ import annotations

import typer

from gptq_cli.cli import options as o
from gptq_cli.cli.output import Session, show, watch
from gptq_cli.cli.preset import shipped_presets
from gptq_cli.events import phase


def rules(context: typer.Context, *, as_json: o.Json = False) -> None:
    """List every rule that a finding can carry the name of, and what each is for.

    gptq quantize --explain RULE prints the whole explanation of one.
    """
    from gptq_cli.display.about import rules_table
    from gptq_cli.jobs import about

    session: Session = context.obj
    show(session, about.rules(), rules_table)


def targets(context: typer.Context, *, as_json: o.Json = False) -> None:
    """List the readers of GPTQ checkpoints that --target knows, and the rules about each."""
    from gptq_cli.display.about import targets_table
    from gptq_cli.jobs import about

    session: Session = context.obj
    show(session, about.targets(), targets_table)


def recipes(context: typer.Context, *, as_json: o.Json = False) -> None:
    """List the recipes with the options that each sets, and the presets that --config knows."""
    from gptq_cli.display.about import recipes_table
    from gptq_cli.jobs import about

    session: Session = context.obj
    show(session, about.recipes(shipped_presets()), recipes_table)


def doctor(context: typer.Context, *, as_json: o.Json = False) -> None:
    """Show versions, devices, memory and threads, and what is slow on this machine and why.

    Exit 0, or 1 when something does not work.
    """
    from gptq_cli.display.about import doctor_table
    from gptq_cli.jobs.doctor import doctor as look

    session: Session = context.obj
    with watch(session, "auto", quiet=False) as observer, phase(observer, "startup"):
        report = look()
    show(session, report, doctor_table)
    if not report.ok:
        raise typer.Exit(1)
