"""The JSON documents of the tool against their schemas, as the package ships them."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import jsonschema

from gptq_cli.display.schemas import DOCUMENTS, EVENTS, FOLDER


@cache
def validator(name: str) -> jsonschema.Draft202012Validator:
    """Of the schema in the file `name`.json."""
    schema = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def checked_document(text: str, name: str | None = None) -> Any:
    """The one JSON document in `text`. Fails unless it is what the schema `name` says, or else exactly one of
    all schemas."""
    body = json.loads(text)
    if name is not None:
        validator(name).validate(body)
        return body
    fits = [name for name in DOCUMENTS if validator(name).is_valid(body)]
    assert len(fits) == 1, (fits, sorted(body), _nearest(body))
    return body


def checked_events(text: str) -> list[Any]:
    """The lines of an event stream, each as its schema says."""
    events = [json.loads(line) for line in text.splitlines()]
    for event in events:
        validator(EVENTS).validate(event)
    return events


def _nearest(body: Any) -> str:
    """What is wrong with the document by the schema that complains least."""
    wrong = {name: [error.message[:200] for error in validator(name).iter_errors(body)] for name in DOCUMENTS}
    name = min(wrong, key=lambda name: len(wrong[name]))
    return f"{name}: {wrong[name]}"
