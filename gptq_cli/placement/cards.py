"""Accelerators by name, with the rates that their makers give, for a time estimate without one at hand.

Figures of the data sheets, for dense matrices. What of them a run reaches is an assumption, see
`planning.rates`: an estimate from here is for comparing plans, not for promises.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True, slots=True)
class CardRates:
    """What one card can do at most."""

    name: str
    half_flops: float
    """Operations per second on bfloat16 (float16 where it has none), with sums in float32."""
    single_flops: float
    """The same on float32."""
    memory_rate: float
    """Bytes per second of its own memory."""
    link_rate: float
    """Bytes per second from main memory."""

    @property
    def words(self) -> str:
        """`h100: 989 TFLOP/s bf16, 67 TFLOP/s fp32, 3350 GB/s memory, 55 GB/s from main memory`."""
        half, single = self.half_flops / TERA, self.single_flops / TERA
        memory, link = self.memory_rate / GIGA, self.link_rate / GIGA
        flops = f"{half:.0f} TFLOP/s bf16, {single:.0f} TFLOP/s fp32"
        return f"{self.name}: {flops}, {memory:.0f} GB/s memory, {link:.0f} GB/s from main memory"


_FIGURES = {
    # name: TFLOP/s bf16, TFLOP/s fp32, GB/s memory, GB/s link
    "t4": (65, 8.1, 320, 12),
    "v100": (125, 15.7, 900, 12),
    "a10": (125, 31.2, 600, 25),
    "a100": (312, 19.5, 2039, 25),
    "l4": (121, 30.3, 300, 25),
    "l40s": (362, 91.6, 864, 25),
    "3090": (71, 35.6, 936, 25),
    "4090": (165, 82.6, 1008, 25),
    "5090": (210, 104.8, 1792, 55),
    "h100": (989, 67, 3350, 55),
    "h200": (989, 67, 4800, 55),
    "b200": (2250, 75, 8000, 55),
    "mi300x": (1307, 163.4, 5300, 55),
}
CARDS = MappingProxyType(
    {
        name: CardRates(name, half * TERA, single * TERA, memory * GIGA, link * GIGA)
        for name, (half, single, memory, link) in _FIGURES.items()
    }
)
"""By the name that `--devices "cuda:0=24GiB@4090"` takes."""
