"""Every JSON document that the tool writes, and its schema: `gptq_cli/schema/NAME.json`, in the package.

The files are generated (`make golden`); a test keeps them up to date and checks documents of real runs
against them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

from gptq_cli.events import Event
from gptq_cli.results.about import DoctorReport, RecipesReport, RuleFact, RulesReport, TargetsReport
from gptq_cli.results.comparison import Comparison
from gptq_cli.results.failure import FailureReport
from gptq_cli.results.load import LoadReport, VerifyReport
from gptq_cli.results.map import MapReport
from gptq_cli.results.push import PushReport
from gptq_cli.results.run import RunReport
from gptq_cli.results.schema import Definitions, Schema, complete, schema_of
from gptq_cli.results.trial import TrialReport

FOLDER = Path(__file__).parent.parent / "schema"
DOCUMENTS: dict[str, tuple[type, str]] = {
    "run_report": (RunReport, "report.json of a checkpoint, and what `gptq quantize --json` prints"),
    "trial_report": (TrialReport, "what `gptq quantize --blocks N --json` prints"),
    "map_report": (MapReport, "what `gptq inspect-map --json` and `gptq quantize --dry-run --json` print"),
    "load_report": (LoadReport, "what `gptq load --json` prints"),
    "verify_report": (
        VerifyReport,
        "what `gptq load --verify --json` prints, also with `--target`, where no model is opened",
    ),
    "push_report": (PushReport, "what `gptq push --json` prints"),
    "comparison": (Comparison, "what `gptq report DIR DIR … --json` prints"),
    "rules": (RulesReport, "what `gptq rules --json` prints"),
    "rule": (RuleFact, "what `--explain RULE --json` prints"),
    "targets": (TargetsReport, "what `gptq targets --json` prints"),
    "recipes": (RecipesReport, "what `gptq recipes --json` prints"),
    "doctor": (DoctorReport, "what `gptq doctor --json` prints"),
    "failure": (FailureReport, "what a command with `--json` prints in place of its result when it fails"),
}
"""Name of the schema, the report that the document is made of, and where it is found."""
EVENTS = "events"


def schemas() -> dict[str, Schema]:
    """Every schema by its name."""
    found = {
        name: schema_of(kind, f"gptq {name.replace('_', ' ')}", f"{where}. Sizes are bytes, times seconds.")
        for name, (kind, where) in DOCUMENTS.items()
    }
    return {**found, EVENTS: _events()}


def as_text(schema: Schema) -> str:
    """A schema as its file holds it."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _events() -> Schema:
    """One line of `--progress jsonl` and of `--events FILE`."""
    known = Definitions()
    lines = [known.object_of(kind, _before(kind.__name__)) for kind in get_args(Event)]
    text = {"type": "string"}
    lines += [
        _line("Log", {"text": text}, "A line that a library wrote to standard error."),
        _line("Failed", {"type": text, "message": text}, "The error that ended the command: the last line."),
    ]
    return complete(
        "gptq events",
        "one line of `--progress jsonl` and of `--events FILE`. Sizes are bytes, times seconds.",
        {"oneOf": lines},
        known,
    )


def _before(name: str) -> Schema:
    """What stands before the fields of an event in its line."""
    return {
        "event": {"const": name},
        "time": {"description": "The time of day, UTC.", "type": "string", "format": "date-time"},
        "elapsed_seconds": {"description": "Since the start of the command.", "type": "number"},
    }


def _line(name: str, own: Schema, description: str) -> Schema:
    properties = {**_before(name), **own}
    return {
        "description": description,
        "type": "object",
        "additionalProperties": False,
        "required": list(properties),
        "properties": properties,
    }
