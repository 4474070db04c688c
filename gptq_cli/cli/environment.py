"""GPTQ_* variables that no option reads: most likely misspelt, so that a setting is not in force."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from gptq_cli.events import Warned
from gptq_cli.user_cache import CACHE_VARIABLE

PREFIX = "GPTQ_"
NO_OPTIONS = frozenset({CACHE_VARIABLE})
"""Variables with our prefix that are not options."""


def known_variables(command: Any) -> frozenset[str]:
    """The variables of all options of a Typer command and of the commands below it."""
    found = {one.envvar for one in command.params if isinstance(one.envvar, str)}
    for below in getattr(command, "commands", {}).values():
        found |= known_variables(below)
    return frozenset(found)


def unread_variables(command: Any, environ: Mapping[str, str]) -> Iterator[Warned]:
    """A warning for each variable that has our prefix and is not the name of an option."""
    known = known_variables(command)
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in known | NO_OPTIONS:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
            hint = f"did you mean {near[0]}?" if near else "gptq --help says how variables are named"
            yield Warned(f"{name} is in the environment, but no option has that name: it is not read", hint)
