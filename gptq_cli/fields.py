"""What the fields of a configuration are made of: defaults with their help, and checks."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import field
from typing import Literal, TypeVar

from gptq_cli.errors import ConfigError

T = TypeVar("T")

Resume = Literal["auto", "never", "required"]
"""What to do about unfinished work at the destination: go on where it is of the same job, remove it, or go on
and nothing else."""

GroupSize = int | Literal["auto"]
"""Input columns that share a scale, see `config.QuantizeConfig`."""

CardKind = Literal["full", "none"]
"""Whether a checkpoint gets a model card."""


def option(default: T, help_text: str, **spelling: str) -> T:
    """A field of a frozen dataclass that is an option of the command line too.

    `help_text`: one sentence. `spelling`, where it does not follow from name and type: `name`, `metavar`, and
    for a flag `off`, the name that turns it off. Typed as its value, as `dataclasses.field` is.
    """
    made: T = field(default=default, metadata={"help": help_text, **spelling})
    return made


def nearest(value: str, allowed: Sequence[str]) -> str | None:
    """The one of `allowed` that `value` may have been meant to be."""
    near = difflib.get_close_matches(value, allowed, n=1, cutoff=0.6)
    return near[0] if near else None


def check_choice(name: str, value: object, allowed: tuple[object, ...], hint: str | None = None) -> None:
    """Raise `ConfigError` unless `value` is in `allowed` (4.0 is not 4). `hint` None: the nearest of them."""
    if not any(value == one and isinstance(value, type(one)) for one in allowed):
        listed = ", ".join(str(item) for item in allowed)
        near = nearest(str(value), [str(item) for item in allowed])
        if hint is None and near is not None:
            hint = f"did you mean {near}?"
        raise ConfigError(f"{name} is {value!r}; allowed: {listed}", hint=hint)


INT32, INT64 = 2**31 - 1, 2**63 - 1
"""The largest count (two of them multiplied are still a number that torch holds), and the largest seed."""


def check_int(
    name: str, value: object, minimum: int, hint: str | None = None, *, maximum: int = INT32
) -> None:
    """Raise `ConfigError` unless `value` is a whole number from `minimum` to `maximum`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ConfigError(f"{name} is {value!r}; allowed: a whole number of at least {minimum}", hint=hint)
    if value > maximum:  # Python refuses to write out a number of thousands of digits
        found = str(value) if value < 10**40 else f"a number of {value.bit_length()} bits"
        raise ConfigError(
            f"{name} is {found}; allowed: a whole number from {minimum} to {maximum}", hint=hint
        )


def check_utf8(name: str, value: str) -> None:
    """Refuse what UTF-8 cannot hold: bytes of another encoding (Python keeps them as lone surrogates)."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        found = ord(value[error.start])
        what = f"byte 0x{found - 0xDC00:02x}" if 0xDC80 <= found <= 0xDCFF else f"half a pair, U+{found:04X},"
        raise ConfigError(
            f"{name} is not UTF-8: {what} at character {error.start + 1}",
            hint="convert the text first, for instance with iconv -f latin1 -t utf-8",
        ) from error


def parse_group_size(value: object) -> GroupSize:
    """A group size as a person writes it: "auto", a number, or the text of one. Raises `ConfigError`."""
    if value == "auto":
        return "auto"
    number = value
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,9}", value.strip(), re.ASCII):
        number = int(value)
    if isinstance(number, bool) or not isinstance(number, int) or (number != -1 and not 0 < number < INT32):
        raise ConfigError(
            f"group_size is {number!r}; allowed: -1 (one group per row), a positive whole number, or auto",
            hint="use --group-size auto, which finds one that divides",
        )
    return number
