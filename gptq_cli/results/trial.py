"""The report of `gptq quantize --blocks N`: some blocks for real, and what the whole job would take."""

from __future__ import annotations

from dataclasses import dataclass

from gptq_cli.results.run import BlockReport


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialReport:
    """The result of a trial. Nothing was written."""

    model: str
    blocks_total: int
    """Blocks of the model."""
    devices: tuple[str, ...]
    phase_seconds: tuple[tuple[str, float], ...]
    """Of the trial."""
    planned_block_seconds: float
    """What the blocks of the trial should have taken, from a short probe of this machine."""
    seconds: float
    """What the whole job would take: what was measured, and for the other blocks, gradients and tuning, their
    share of the plan, corrected by how far the measured blocks were from theirs."""
    predicted_peak_bytes: tuple[tuple[str, int], ...]
    measured_peak_bytes: tuple[tuple[str, int], ...]
    """Of the trial: every block is worked on in the memory of the largest."""
    size_after_bytes: int
    """Bytes of all tensors of the checkpoint."""
    snapshot_bytes: int
    """Bytes of the hidden states, which a run that can be continued keeps beside it, twice for a moment."""
    gradient_bytes: int
    """Bytes of gradients of the dense model, which the whole keeps beside it."""
    warnings: tuple[str, ...]
    blocks: tuple[BlockReport, ...]
    """Those that were worked on."""

    @property
    def block_seconds(self) -> float:
        """What the blocks of the trial took."""
        return sum(block.seconds for block in self.blocks)
