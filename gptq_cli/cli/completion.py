"""Values that a shell can complete. Nothing heavy is imported: a person waits for the tab key.

Each function gets what was typed so far and returns the values that begin so. Options with a fixed choice of
words are completed by Typer itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import get_args

from gptq_cli.cli.preset import shipped_presets
from gptq_cli.config import AUTO_GROUPS
from gptq_cli.module_settings import ALLOWED_BITS
from gptq_cli.placement.device_map import STRATEGIES
from gptq_cli.readers import Target

Complete = Callable[[str], list[str]]


def _beginning(values: Iterable[object], incomplete: str) -> list[str]:
    return [value for value in map(str, values) if value.startswith(incomplete)]


def targets(incomplete: str) -> list[str]:
    """Readers of checkpoints."""
    return _beginning(get_args(Target), incomplete)


def bits(incomplete: str) -> list[str]:
    """Bit widths."""
    return _beginning(ALLOWED_BITS, incomplete)


def group_sizes(incomplete: str) -> list[str]:
    """Group sizes that all readers take."""
    return _beginning(("auto", *AUTO_GROUPS, -1), incomplete)


def presets(incomplete: str) -> list[str]:
    """Shipped presets; where none fits, the shell completes the names of files."""
    return _beginning(shipped_presets(), incomplete)


def rules(incomplete: str) -> list[str]:
    """Ids of rules."""
    from gptq_cli.preflight.registry import RULES

    return _beginning(RULES, incomplete)


def texts(incomplete: str) -> list[str]:
    """Texts that need no file."""
    return _beginning(("pydoc", "pydoc-heldout", "self", "wikitext2", "c4"), incomplete)


def device_maps(incomplete: str) -> list[str]:
    """Strategies, and the devices of this machine as far as the file system shows them."""
    return _beginning((*STRATEGIES, *_devices()), incomplete)


def _devices(root: Path = Path("/dev")) -> list[str]:
    cards = sorted(int(path.name[6:]) for path in root.glob("nvidia*") if path.name[6:].isdigit())
    return ["cpu", *(f"cuda:{number}" for number in cards), *(["mps"] if sys.platform == "darwin" else [])]
