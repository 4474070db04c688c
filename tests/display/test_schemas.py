"""The shipped schemas are those of today's reports and events, and one exists for each of them."""

from __future__ import annotations

import json
import os

import pytest

from gptq_cli.display.schemas import DOCUMENTS, EVENTS, FOLDER, as_text, schemas
from gptq_cli.results.document import document
from tests.display.events import load_report, report, sample_run
from tests.documents import checked_document, checked_events, validator
from tests.golden import FOLDER as GOLDEN


def test_the_files_are_up_to_date() -> None:
    made = {f"{name}.json": as_text(schema) for name, schema in schemas().items()}
    if os.environ.get("UPDATE_GOLDEN"):
        for path in FOLDER.glob("*.json"):
            path.unlink()
        for name, text in made.items():
            (FOLDER / name).write_text(text, encoding="utf-8")
    held = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    assert held == made, "if this is meant: make golden"


@pytest.mark.parametrize("name", [*DOCUMENTS, EVENTS])
def test_each_is_a_schema_whose_references_lead_somewhere(name: str) -> None:
    schema = validator(name).schema
    referred = {text.split("/")[-1] for text in json.dumps(schema).split('"') if text.startswith("#/$defs/")}
    assert referred == set(schema["$defs"])


def test_events_fit_and_others_do_not() -> None:
    text = (GOLDEN / "events.jsonl").read_text(encoding="utf-8")
    seen = {event["event"] for event in checked_events(text)}
    assert seen == {type(event).__name__ for _, event in sample_run(3)}
    with pytest.raises(Exception, match="is not valid under any of the given schemas"):
        checked_events(text.replace('"PhaseStarted"', '"PhaseBegun"'))


def test_a_document_fits_one_schema_alone() -> None:
    for made in (report(2), load_report()):
        text = json.dumps(document(made))
        checked_document(text)
        with pytest.raises(AssertionError, match="surprise"):
            checked_document(text.replace('"schema_version"', '"surprise": 1, "schema_version"'))
