"""Options come from the fields of a configuration: one more field is one more option."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import pytest
import typer
import typer.main
from typer.testing import CliRunner

from gptq_cli.cli.app import app
from gptq_cli.cli.config_options import CODES, ConfigFields, with_config_options
from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.fields import option
from gptq_cli.recipes import RECIPE_FIELDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A configuration that the product has never seen."""

    tolerance: float = option(0.5, "How near is near enough.")
    rounds: int | None = option(None, "How often.")
    kind: Literal["a", "b"] = option("b", "Which kind: a or b.")
    size: int | Literal["all"] = option("all", "How many, or all.", metavar="COUNT")
    warm: bool = option(True, "Warm, or not.", off="cold")
    keep_order: bool = option(False, "Keep the order.")
    origin: str = option("here", "From where.", name="source", metavar="PLACE")
    hidden: int = 3


EVERY = ("tolerance", "rounds", "kind", "size", "warm", "keep_order", "origin")


def invoke(*words: str) -> tuple[int, dict[str, Any]]:
    """The exit code of a command with the options of `Made`, and what the command got."""
    got: dict[str, Any] = {}

    def command(word: str, *, made: Mapping[str, Any], loud: bool = False) -> None:
        got.update(made, word=word, loud=loud)

    command.__annotations__["made"] = Annotated[Mapping[str, Any], ConfigFields(Made, "Panel", EVERY)]
    alone = typer.Typer()
    alone.command()(with_config_options(command))
    return CliRunner().invoke(alone, ["W", *words]).exit_code, got


def run(*words: str) -> dict[str, Any]:
    code, got = invoke(*words)
    assert code == 0
    return got


def test_defaults_are_those_of_the_fields() -> None:
    got = run()
    assert (got.pop("word"), got.pop("loud")) == ("W", False)
    assert Made(**got) == Made()


def test_every_field_is_an_option_of_its_own_type() -> None:
    words = "--tolerance 2 --rounds 7 --kind a --size 12 --cold --keep-order --source there --loud"
    got = run(*words.split())
    assert got.pop("loud") is True
    assert got == {
        "word": "W",
        "tolerance": 2.0,
        "rounds": 7,
        "kind": "a",
        "size": "12",
        "warm": False,
        "keep_order": True,
        "origin": "there",
    }
    assert run("--no-keep-order")["keep_order"] is False


@pytest.mark.parametrize("words", ["--kind c", "--rounds many", "--hidden 4", "--no-warm", "--origin x"])
def test_nothing_else_is_an_option(words: str) -> None:
    assert invoke(*words.split()) == (2, {})


@pytest.mark.parametrize("name", ["quantize", "inspect-map"])
def test_help_and_default_are_the_field_s(name: str) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    options = {parameter.name: parameter for parameter in command.params}
    found = 0
    for config in (QuantizeConfig, CalibrationConfig):
        for field in fields(config):
            made = options.get(field.metadata.get("name", field.name))
            if made is None:
                assert name == "inspect-map"
                assert field.name not in CODES
                continue
            found += 1
            of_recipe = field.name in RECIPE_FIELDS
            repeatable = field.name in ("modules", "sources")
            assert made.default == (None if of_recipe or repeatable else field.default)
            assert made.help.startswith(field.metadata["help"].removesuffix("."))
            assert ("default: --recipe's" in made.help) is of_recipe
    assert found == {"quantize": 24, "inspect-map": 15}[name]


def test_the_help_of_recipe_lists_what_recipes_change() -> None:
    command = typer.main.get_command(app).commands["quantize"]  # type: ignore[attr-defined]
    (recipe,) = (parameter for parameter in command.params if parameter.name == "recipe")
    listed = recipe.help.split("defaults of ")[1].removesuffix(".").split(", ")
    assert {name.removeprefix("--").replace("-", "_") for name in listed} == RECIPE_FIELDS
