"""The result of tuning: new values for tensors of the checkpoint that have values already."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gptq_cli.results.run import TuningReport


@dataclass(frozen=True, slots=True, eq=False)
class Tuned:
    """What became of a tuning."""

    report: TuningReport
    tensors: dict[str, Tensor]
    """By their names in the checkpoint; empty where the old values stay."""
