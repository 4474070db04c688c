"""One type for a device, one for its spelling, and sizes in bytes.

Everything that a person, a JSON file or torch may call a device becomes a `Device` before it is checked,
because torch does not help here: `torch.device("cpu") == "cpu"` is False, and `0`, `"0"`, `"cuda:0"` and
`torch.device("cuda:0")` are one device. `disk` and `meta` are devices, too: rules refuse them, with a better
explanation than a grammar can give.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from gptq_cli.errors import DeviceMapError
from gptq_cli.wording import as_json

INDEXED_KINDS = ("cuda", "xpu", "npu", "hpu", "mlu", "musa", "sdaa")
"""Accelerators of which a machine may hold several; accelerate names them by a bare index."""
SINGLE_KINDS = ("mps", "cpu", "disk", "meta")
KINDS = INDEXED_KINDS + SINGLE_KINDS
VISIBLE_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
    "ASCEND_RT_VISIBLE_DEVICES",
)
"""Variables of the environment that choose and number the accelerators that a process sees."""
ALLOWED_DEVICE = "cpu, cuda:0, xpu:0, npu:0, mps, or a bare index such as 0"

_DEVICE = re.compile(r"([A-Za-z_]+)(?::(-?[0-9]+))?\Z", re.ASCII)
_INDEX = re.compile(r"[0-9]{1,4}\Z", re.ASCII)
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\Z", re.ASCII)
_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base ** (power + 1)
    for power, prefix in enumerate("kmgt")
    for suffix, base in (("b", 1000), ("ib", 1024))
}


@runtime_checkable
class DeviceLike(Protocol):
    """What `torch.device` looks like from a floor that does not know torch."""

    @property
    def type(self) -> str: ...
    @property
    def index(self) -> int | None: ...


def syntax_error(
    what: str, text: str, position: int, message: str, *, hint: str | None = None
) -> DeviceMapError:
    """An error that shows the line of `text` around `position` with a caret under the character.

    `what` opens the message ("device map", "max memory").
    """
    position = max(0, min(position, len(text)))
    start = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    line = text[start : end if end >= 0 else len(text)]
    column = position - start
    left = max(0, column - 40)
    shown = line[left : left + 70]
    shown = "".join(c if c.isprintable() else "?" for c in shown)
    before, after = ("…" if left else ""), ("…" if left + 70 < len(line) else "")
    caret = " " * (len(before) + column - left) + "^"
    return DeviceMapError(
        f"{what}: {message}\n  {before}{shown}{after}\n  {caret}", hint=hint, position=position
    )


@functools.total_ordering
@dataclass(frozen=True, slots=True)
class Device:
    """One device. Accelerators of an indexed kind always carry an index, the others never do."""

    kind: str
    index: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DeviceMapError(f"{self.kind!r} is not a kind of device; allowed: {', '.join(KINDS)}")
        if self.kind in INDEXED_KINDS:
            object.__setattr__(self, "index", self.index or 0)
        elif self.index not in (None, 0):
            raise DeviceMapError(f"there is only one {self.kind!r}; found index {self.index}")
        else:
            object.__setattr__(self, "index", None)

    @staticmethod
    def parse(value: object, accelerator: str = "cuda") -> Device:
        """`0`, `"0"`, `"cuda:0"`, `torch.device("cuda:0")` and a `Device` give the same `Device`.

        A bare index means the kind `accelerator`. Raises `DeviceMapError`.
        """
        if isinstance(value, Device):
            return value
        if isinstance(value, bool) or value is None:
            raise _no_device(value)
        if isinstance(value, int):
            if not 0 <= value <= 9999:
                raise DeviceMapError(
                    f"device index {str(value)[:20]} is out of range; allowed: 0 and up", hint="count from 0"
                )
            return Device(accelerator, value)
        if isinstance(value, str):
            return _parse_device_text(value.strip(), accelerator)
        if isinstance(value, DeviceLike) and isinstance(value.type, str):
            return Device(value.type, value.index)
        raise _no_device(value)

    def __str__(self) -> str:
        return self.kind if self.index is None else f"{self.kind}:{self.index}"

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Device):
            return NotImplemented
        return self._rank < other._rank

    @property
    def _rank(self) -> tuple[int, int]:
        return KINDS.index(self.kind), self.index or 0

    @property
    def is_accelerator(self) -> bool:
        """True for everything that computes and is not a CPU."""
        return self.kind not in ("cpu", "disk", "meta")

    @property
    def for_accelerate(self) -> int | str:
        """The spelling that accelerate treats alike in every place: an int where the kind has indexes."""
        return self.index if self.index is not None else self.kind


CPU = Device("cpu")


def _no_device(value: object) -> DeviceMapError:
    shown = as_json(value) if value is None or isinstance(value, bool) else repr(value)
    return DeviceMapError(
        f"{shown[:60]} is not a device; allowed: {ALLOWED_DEVICE}", hint="write for example cuda:0 or cpu"
    )


def _parse_device_text(text: str, accelerator: str) -> Device:
    if _INDEX.match(text):
        return Device(accelerator, int(text))
    if re.match(r"-\s*[0-9]+\Z", text):
        raise DeviceMapError(
            f"device index {text[:20]} is negative; allowed: 0 and up",
            hint="count from 0; write cpu for the CPU",
        )
    match = _DEVICE.match(text)
    kind, index = (match.group(1), match.group(2)) if match else ("", None)
    if kind not in KINDS:
        lower = kind.lower()
        if lower in ("gpu", "cuda", "rocm", "hip"):
            spelled = f"cuda:{index}" if index else "cuda"
            raise DeviceMapError(
                f"{text[:60]!r} is not a device; allowed: {ALLOWED_DEVICE}",
                hint=f"write {spelled} (AMD cards are called cuda, too)",
            )
        if lower in KINDS:
            raise DeviceMapError(f"{text[:60]!r} must be lower case", hint=f"write {text.lower()[:60]}")
        raise _no_device(text)
    if index is not None and not _INDEX.match(index):
        raise DeviceMapError(
            f"device index {index[:20]} is out of range; allowed: 0 to 9999",
            hint="count from 0; write cpu for the CPU",
        )
    return Device(kind, int(index) if index is not None else None)


def is_bare_index(value: object) -> bool:
    """True for `0` and `"0"`: the kind is whatever accelerator the machine has."""
    return isinstance(value, int) or (isinstance(value, str) and _INDEX.match(value.strip()) is not None)


def parse_size(text: object) -> int:
    """Bytes of `"5GB"` (10^9), `"5GiB"` (2^30), `"200MiB"`, `"4096"`. Never bits. Raises `DeviceMapError`."""
    if isinstance(text, int) and not isinstance(text, bool):
        if text < 0:
            raise DeviceMapError(f"size {str(text)[:40]} is negative; allowed: 0 and up")
        return text
    hint = "write for example 20GiB or 20GB"
    allowed = (
        "allowed: a number of bytes, or a number with KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB"
    )
    match = _SIZE.match(text.strip()) if isinstance(text, str) else None
    unit = match.group(2) if match else ""
    if match is None or unit.lower() not in _UNITS:
        raise DeviceMapError(f"{as_json(text, 60)} is not a size; {allowed}", hint=hint)
    written = match.string
    if unit[-1:] == "b" and not unit.islower():
        raise DeviceMapError(f"{written!r} reads as bits; sizes are bytes", hint=f"write {written[:-1]}B")
    number, _, fraction = match.group(1).partition(".")
    factor: int = _UNITS[unit.lower()]
    return int(number) * factor + (int(fraction) * factor // 10 ** len(fraction) if fraction else 0)


def parse_capacity(text: object) -> int:
    """As `parse_size`, for the memory of a device or the size of a file: a number without a unit must be 0 or
    at least 1 MiB, because `24` means 24 GiB to who writes it. Raises `DeviceMapError`.
    """
    size = parse_size(text)
    written = str(text).strip()
    bare = written.replace(".", "", 1).isdecimal()
    if bare and float(written) > 0 and size < _UNITS["mib"]:
        meant = "GiB" if size < 1024 else "MiB"
        byte = "byte" if float(written) == 1 else "bytes"
        raise DeviceMapError(
            f"{written} has no unit: {written} {byte}, or {written} {meant}?",
            hint=f"write {written}{meant}, or {written}B for bytes",
        )
    return size


def format_size(size_bytes: float) -> str:
    """Bytes for people: `21.4 GiB`, `1.50 KiB`, `512 B`. Powers of 1024, three significant digits."""
    sign, left = ("-", -size_bytes) if size_bytes < 0 else ("", size_bytes)
    if left < 1000:
        return f"{sign}{left:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        left /= 1024
        if left < 999.5:
            return f"{sign}{three_digits(left)} {unit}"
    return f"{sign}{three_digits(left / 1024)} TiB"


def three_digits(value: float) -> str:
    """`1.50`, `21.4`, `832`."""
    if value < 9.995:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def exact_size(size_bytes: int) -> str:
    """The shortest text that `parse_size` reads back as the same number."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        factor = _UNITS[unit.lower()]
        if size_bytes and size_bytes % factor == 0:
            return f"{size_bytes // factor}{unit}"
    return f"{size_bytes}B" if 0 < size_bytes < _UNITS["mib"] else str(size_bytes)
