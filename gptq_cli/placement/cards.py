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
    fast_flops: float
    """The same on float32 whose factors are rounded to TF32, where it does that; else as `single_flops`."""
    memory_rate: float
    """Bytes per second of its own memory."""
    link_rate: float
    """Bytes per second from main memory."""
    fused: bool
    """The solver's loop over columns is one kernel there: CUDA of capability 8.0 or newer."""

    @property
    def words(self) -> str:
        """`h100: 989 TFLOP/s bf16, 495 TF32, 67 fp32, 3350 GB/s memory, 55 GB/s from main memory`."""
        half, fast, single = (x / TERA for x in (self.half_flops, self.fast_flops, self.single_flops))
        memory, link = self.memory_rate / GIGA, self.link_rate / GIGA
        rounded = f", {fast:.0f} TF32" if fast != single else ""
        flops = f"{half:.0f} TFLOP/s bf16{rounded}, {single:.0f} fp32"
        return f"{self.name}: {flops}, {memory:.0f} GB/s memory, {link:.0f} GB/s from main memory"


_FIGURES = {
    # name: TFLOP/s bf16, TFLOP/s TF32, TFLOP/s fp32, GB/s memory, GB/s link
    "t4": (65, 8.1, 8.1, 320, 12),
    "v100": (125, 15.7, 15.7, 900, 12),
    "a10": (125, 62.5, 31.2, 600, 25),
    "a100": (312, 156, 19.5, 2039, 25),
    "l4": (121, 60, 30.3, 300, 25),
    "l40s": (362, 183, 91.6, 864, 25),
    "3090": (71, 35.6, 35.6, 936, 25),
    "4090": (165, 82.6, 82.6, 1008, 25),
    "5090": (210, 104.8, 104.8, 1792, 55),
    "h100": (989, 495, 67, 3350, 55),
    "h200": (989, 495, 67, 4800, 55),
    "b200": (2250, 1125, 75, 8000, 55),
    "mi300x": (1307, 163.4, 163.4, 5300, 55),
}
_NOT_FUSED = ("t4", "v100", "mi300x")
CARDS = MappingProxyType(
    {
        name: CardRates(
            name=name,
            half_flops=half * TERA,
            fast_flops=fast * TERA,
            single_flops=single * TERA,
            memory_rate=memory * GIGA,
            link_rate=link * GIGA,
            fused=name not in _NOT_FUSED,
        )
        for name, (half, fast, single, memory, link) in _FIGURES.items()
    }
)
"""By the name that `--devices "cuda:0=24GiB@4090"` takes."""
