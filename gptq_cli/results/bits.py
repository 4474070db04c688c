"""What each number of bits would cost, measured, and the bits that a budget was spent on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

TRIAL_BITS = 3
"""At which the divergence is measured: enough to stand out, few enough that it grows with the loss."""
LOSS_BITS = (2, TRIAL_BITS)
"""At which losses are computed; from there on, each further bit leaves a quarter."""

SAMPLED_ROWS = 256
"""Of all linears that share a Hessian: on these losses are computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BitLosses:
    """What fewer bits of some linears cost, all others being dense."""

    kl: float
    """KL(dense ‖ with these linears at `TRIAL_BITS`), the mean over tokens in nats."""
    losses: Mapping[int, float]
    """Bits -> the relative loss of these linears after one pass of GPTQ, at `LOSS_BITS`."""

    def predicted(self, bits: int | None) -> float:
        """The divergence at `bits`, None: dense. It is taken to grow with the loss.

        Errors are half as large with every bit, as soon as these are not so few that scales clip, and losses
        their squares: of SmolLM2's linears the loss at 3 bits is 3.7 to 4.1 times that at 4.
        """
        at_trial = self.losses[TRIAL_BITS]
        if bits is None or not at_trial:
            return 0.0
        known = max(held for held in LOSS_BITS if held <= bits)
        return self.kl * (self.losses[known] / at_trial) * 4.0 ** (known - bits)


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedBits:
    """The bits of linears that are alike, because a server loads them as one matrix."""

    linears: tuple[str, ...]
    """Folded where there are many: `model.layers.3.mlp.experts.*.up_proj`."""
    weights: int
    bits: int | None
    """None: dense."""
    size_bytes: int
    """Of all their tensors in the file."""
    kl: float
    """What they are predicted to add to the divergence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UniformBits:
    """What it would be to give all linears the same bits."""

    bits: int
    bits_per_parameter: float
    kl: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BitChoice:
    """How a budget of bits was spent."""

    json_properties: ClassVar[tuple[str, ...]] = ("bits_per_parameter", "spare_bytes", "kl")

    asked: float
    """Bits per parameter of the whole checkpoint, as given."""
    parameters: int
    """Of the dense model, tied ones counted once."""
    budget_bytes: int
    """asked · parameters / 8, rounded down."""
    size_bytes: int
    """Of all safetensors files, their headers included."""
    measured_tokens: int
    """On which the divergence was measured; 0: it was not, and all weights count the same."""
    fused: tuple[FusedBits, ...]
    """In model order."""
    given_modules: tuple[str, ...]
    """Settings by module that were given; they come after those of the choice."""
    quantize_head: bool
    """That the head is quantized was asked for."""
    uniform: tuple[UniformBits, ...]
    """For comparison."""

    @property
    def bits_per_parameter(self) -> float:
        """What was reached."""
        return 8 * self.size_bytes / max(1, self.parameters)

    @property
    def spare_bytes(self) -> int:
        """What is left of the budget."""
        return self.budget_bytes - self.size_bytes

    @property
    def kl(self) -> float:
        """The predicted divergence of the whole: those of all its parts added up."""
        return sum(one.kl for one in self.fused)
