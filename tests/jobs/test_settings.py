"""The settings of a report are options of `gptq quantize`, all that decide what comes out."""

from __future__ import annotations

from dataclasses import fields

import typer.main

from gptq_cli.cli.app import app
from gptq_cli.cli.preset import options_of
from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig, QuantizeJob
from gptq_cli.jobs.settings import settings_of
from gptq_cli.load_job import LoadJob, TaskConfig

NOT_SETTINGS = {
    "recipe": "its fields are there",
    "devices": "only planned for",
    "overwrite": "what to do with an output that exists is for the person to say",
    "resume": "as above",
    "push_to_hub": "as above",
    "private": "as above",
    "dry_run": "the run was none",
    "processes": "only planned for",
    "blocks": "the run was no trial",
    "report": "shown, not done",
    "json": "shown, not done",
    "progress": "shown, not done",
    "log_file": "shown, not done",
    "events": "shown, not done",
    "quiet": "shown, not done",
    "config": "what it held is there",
}


def made() -> dict[str, object]:
    job = QuantizeJob(model=ModelRef(model="M"), out="O", quantize=QuantizeConfig(group_size=64))
    proof = LoadJob(path="O", against="M", tasks=TaskConfig(names=("t",), min_scores=(("t", 0.4),)))
    return dict(settings_of(job, revision="abc", card=True, proof=proof))


def test_every_setting_is_an_option_and_every_other_option_has_a_reason() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = set(options_of(commands["quantize"]))
    assert set(made()) == (options | {"config"}) - set(NOT_SETTINGS)


def test_every_field_of_the_configurations_is_there() -> None:
    for config in (QuantizeConfig, CalibrationConfig):
        assert {item.metadata.get("name", item.name) for item in fields(config)} <= set(made())


def test_what_depends_on_the_model_is_resolved() -> None:
    found = made()
    assert (found["revision"], found["group_size"], found["max_shard_size"]) == ("abc", 64, "5000000000B")


def test_limits_of_tasks_are_written_as_they_are_given() -> None:
    assert (made()["tasks"], made()["min_score"]) == ("t", ("t=0.4",))
