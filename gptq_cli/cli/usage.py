"""What is wrong with the words of a command line, in our own words.

Typer's errors are recognised by their attributes, since its copy of Click is not to be imported. Its values
are read by pydantic, whose errors hold what was given.
"""

from __future__ import annotations

import difflib
import os
from typing import Any

from gptq_cli.fields import nearest
from gptq_cli.files import shown

NEAR = 0.7
"""How alike two names must be, from 0 to 1, for one to be offered in place of the other."""
_KINDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false"}
_LARGEST = "a whole number of fewer than 4300 digits"


def usage_words(error: Exception, message: str, command: str) -> tuple[str, str]:
    """Message and hint for a usage error; `message` is Typer's, and stays where ours has no more to say.

    `command`: the one that was asked for, where the error does not know it.
    """
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else f"gptq {command}".strip()
    hint = f"{path} --help"
    words = message[0].lower() + message[1:].rstrip(".")
    unknown = getattr(error, "option_name", None)
    if unknown is not None and hasattr(error, "possibilities"):
        words = f"no such option: {unknown}"
        near = near_options(unknown, error.possibilities or ())
        if near:
            hint = f"did you mean {' or '.join(near)}? {path} --help lists all"
    elif unknown is not None:
        takes = "takes no value" if "does not take" in message else "needs a value"
        words = f"{unknown} {takes}"
    elif context is not None and hasattr(context.command, "commands") and context.command.commands:
        asked = command or "no command"
        words = f"no such command: {shown(asked)}; available: {', '.join(context.command.commands)}"
        meant = nearest(asked, list(context.command.commands))
        hint = f"did you mean gptq {meant}?" if meant else hint
    given = _given(error)
    if given is not None:
        name, value, allowed, choices = given
        words = f"{name} is {shown(str(value))!r}; allowed: {allowed}"
        meant = nearest(str(value), choices)
        if meant:
            hint = f"did you mean {meant}? {path} --help says what each is"
    variable = getattr(getattr(error, "param", None), "envvar", None)
    if isinstance(variable, str) and variable in os.environ:
        words += f" ({variable} is {os.environ[variable]!r} in the environment)"
    return words, hint


def near_options(name: str, options: Any) -> list[str]:
    """Those of `options` that are spelt much like `name`; the dashes, which all have, do not count."""
    bare = {option.lstrip("-"): option for option in options}
    return [bare[near] for near in difflib.get_close_matches(name.lstrip("-"), bare, n=2, cutoff=NEAR)]


def _given(error: Exception) -> tuple[str, object, str, tuple[str, ...]] | None:
    """Of a value that cannot be read: option, value, what is allowed, and the words where it is a choice."""
    param, cause = getattr(error, "param", None), error.__cause__
    reading = getattr(param, "type_descriptor", None)
    listed = getattr(cause, "errors", None)
    if param is None or reading is None or listed is None:
        return None
    first = listed()[0]
    name = next((one for one in param.opts if one.startswith("--")), str(param.metavar or param.name))
    if reading.choices is not None:
        choices = tuple(str(getattr(one, "value", one)) for one in reading.choices)
        return name, first["input"], ", ".join(choices), choices
    if first["type"] == "int_parsing_size":
        return name, first["input"], _LARGEST, ()
    kind = _KINDS.get(reading.annotation)
    return None if kind is None else (name, first["input"], kind, ())
