"""One JSON object an event."""

import io
import json
from datetime import UTC, datetime

from gptq_cli.display.jsonl import JsonlDisplay
from tests.display.events import sample_run
from tests.display.test_plain import Clock, ranks_reported
from tests.golden import check_golden

NOON = "2026-11-26T12:00:00.000+00:00"


def written(blocks: int) -> str:
    clock, stream = Clock(), io.StringIO()
    with JsonlDisplay(stream, clock, lambda: NOON) as display:
        for clock.now, event in sample_run(blocks):
            display(event)
    return stream.getvalue()


def test_the_stream_of_a_whole_run() -> None:
    check_golden("events.jsonl", written(1))


def test_every_line_is_an_object_that_names_its_event() -> None:
    objects = [json.loads(line) for line in written(2).splitlines()]
    assert [item["event"] for item in objects] == [type(event).__name__ for _, event in sample_run(2)]
    assert [item["elapsed_seconds"] for item in objects] == [round(now, 3) for now, _ in sample_run(2)]
    assert all(isinstance(item["elapsed_seconds"], float) for item in objects)


def test_a_foreign_line_is_an_event_as_well() -> None:
    stream = io.StringIO()
    JsonlDisplay(stream, Clock(), lambda: NOON).log('UserWarning: "x"')
    assert json.loads(stream.getvalue()) == {
        "event": "Log",
        "time": NOON,
        "elapsed_seconds": 0.0,
        "text": 'UserWarning: "x"',
    }


def test_lines_carry_the_time_of_day_with_its_zone() -> None:
    stream = io.StringIO()
    JsonlDisplay(stream).log("x")
    told = datetime.fromisoformat(json.loads(stream.getvalue())["time"])
    assert abs((datetime.now(UTC) - told).total_seconds()) < 60


def test_ranks_are_objects_with_the_memory_of_their_devices() -> None:
    stream = io.StringIO()
    JsonlDisplay(stream)(ranks_reported(2))
    (line,) = stream.getvalue().splitlines()
    told = json.loads(line)
    assert (told["event"], told["block"]) == ("RanksReported", "model.layers.3")
    assert [(one["rank"], one["host"], one["waited_seconds"]) for one in told["ranks"]] == [
        (0, "node2", 3.0),
        (1, "node2", 0.5),
    ]
    assert told["ranks"][0]["memory"][0]["device"] == "cuda:0"
