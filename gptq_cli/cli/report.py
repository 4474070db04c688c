"""`gptq report DIR [DIR …]`: what earlier runs left behind, as a table, a document or a page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gptq_cli.cli import options as o
from gptq_cli.cli.output import Session, show
from gptq_cli.cli.page_file import check_page, write_page
from gptq_cli.results.comparison import Comparison
from gptq_cli.results.load import LoadReport, VerifyReport
from gptq_cli.results.run import RunReport

if TYPE_CHECKING:
    from rich.console import RenderableType

Found = RunReport | LoadReport | VerifyReport | Comparison
Reports = Annotated[
    list[str],
    typer.Argument(
        metavar="DIR...",
        help="Directories of checkpoints, or documents that gptq load --json printed.",
        envvar="GPTQ_REPORTS",
        show_envvar=False,
    ),
]


def report(context: typer.Context, paths: Reports, *, out: o.Page = None, as_json: o.Json = False) -> None:
    """Show the report of a finished checkpoint, or compare several: settings that differ, and all figures.

    Reads report.json, and no weight. Of a checkpoint without one the config and the size are shown.
    """
    session: Session = context.obj
    page = None if out is None else check_page("out", out)
    from gptq_cli.jobs import reporting

    found = reporting.compare(paths) if len(paths) > 1 else reporting.report_of(paths[0])
    if page is not None:
        write_page(page, _drawn(found))
    show(session, found, _table)


def _table(found: Found) -> RenderableType:
    from gptq_cli.display import comparison, load

    match found:
        case RunReport():
            return load.quantized_summary(found)
        case LoadReport():
            return load.load_summary(found)
        case VerifyReport():
            return load.verify_summary(found)
        case Comparison():
            return comparison.comparison_table(found)


def _drawn(found: Found) -> str:
    from gptq_cli.report import comparison_page, load_page, page

    match found:
        case RunReport():
            return page.report_html(found)
        case Comparison():
            return comparison_page.comparison_html(found)
        case _:
            return load_page.load_html(found)
