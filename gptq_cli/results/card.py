"""What a model card says beyond the report of its run: the source's own card, readers, digests of files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gptq_cli.results.load import TargetReport
from gptq_cli.results.run import RunReport

CARD = "README.md"
"""The file of a model card."""


HERE = "DIR"
"""What commands in a card call a checkpoint that has no name on the Hub."""
_COMMANDS = re.compile(
    rf"^((?:vllm serve|python -m sglang\.launch_server --model-path) )({HERE})$"
    rf"|((?:from_pretrained\(|model=)')({HERE})(?=')",
    re.MULTILINE,
)


def renamed(card: str, name: str) -> str:
    """The card with its commands about `name` where they are about `HERE`; nothing else is changed."""
    return _COMMANDS.sub(lambda found: (found[1] or found[3]) + name, card)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCard:
    """What the card of the source says that holds for its quantization, too. Empty: it does not say."""

    license: str = ""
    license_name: str = ""
    license_link: str = ""
    pipeline_tag: str = ""
    language: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """The facts of a card that the report of the run does not hold."""

    name: str
    """What commands in the card call the checkpoint: a Hub id, or the name of its directory."""
    base_model: str
    """A Hub id, or the name of a local directory; "" where the name is none that the Hub allows."""
    calibration: tuple[str, ...]
    """The sources of the text as they were given."""
    source: SourceCard
    pipeline_tag: str
    """Where the source's card has none: what the model's class does."""
    targets: tuple[TargetReport, ...]
    """Every known reader, and whether it takes the checkpoint."""
    digests: tuple[tuple[str, str], ...]
    """(file, sha256) of the weights and configs."""


CardMaker = Callable[[RunReport, CardFacts], Mapping[str, str]]
"""Makes the files of a card: names and texts."""
