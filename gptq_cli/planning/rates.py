"""How fast the machine is, in the few rates that an estimate of time is counted from.

A probe of two seconds runs the real things on made-up numbers: a matmul as in a forward, a Hessian, and two
solves of different height, from which the price of a column and of a weight follow. It also reads some pieces
of the model's files. Clocks and caches may move it by a factor of two, and other work on the machine by more,
so it notes how long its threads waited for a processor. For a card that is named and not there, the rates are
those of its data sheet, and the share of them that is reached is assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import process_time
from typing import TYPE_CHECKING

from gptq_cli.config import QuantizeConfig
from gptq_cli.devices.disk import read_rate
from gptq_cli.devices.host_threads import waited_seconds
from gptq_cli.model.facts import ModelFacts
from gptq_cli.placement.cards import CARDS, CardRates
from gptq_cli.placement.device import Device
from gptq_cli.planning.cases import Work
from gptq_cli.timing import fastest

if TYPE_CHECKING:
    from torch import Tensor

DISK_BYTES_PER_SECOND = 500e6
LINK_BYTES_PER_SECOND = 12e9
"""From main memory to an accelerator: the older generation of PCIe, until it is measured."""
RANKS_BYTES_PER_SECOND = 20e9
"""Of a rank to the others: what PCIe 4.0 gives; NVLink gives ten times as much, 100 Gb/s Ethernet half. An
assumption."""
REACHED = 0.5
"""The part of a data sheet's rates that a run is taken to reach. An assumption."""
CHOLESKY_REACHED = 0.3
"""The same of a factorisation, of the fp32 rate: measured on one H200, 21 TFLOP/s of 67."""
CARD_COLUMN_SECONDS = 6e-6
"""A column of the solver's loop on a card: a step to solve it and one to sweep it, 1.5 µs each where a kernel
walks many columns, of which `REACHED` is reached. An assumption."""
LAUNCHED_COLUMN_SECONDS = 40e-6
"""The same where each column is some launches of kernels. An assumption."""
HESSIAN_PART = 9 / 16
"""Of T · K² multiply-adds, those for the lower triangle of a Hessian, on a card."""
CARD_SOLVE_BYTES = 80
"""What the solve of a weight reads and writes in the card's memory. An assumption."""
CARD_DISK_BYTES_PER_SECOND = 2e9
"""Beside a card that is named: an NVMe disk."""
_K, _LOW_ROWS, _HIGH_ROWS, _TOKENS = 256, 128, 1152, 2048
_ATTEMPTS, _MIN_SECONDS = 5, 0.3


@dataclass(frozen=True, slots=True)
class MachineRates:
    """What the probe found. Rates in multiply-adds per second."""

    forward_rate: float
    hessian_rate: float
    matmul_rate: float
    column_seconds: float
    weight_seconds: float
    waited_share: float | None = None
    """Share of the probe's time that its threads waited for a processor; None where the system does not
    tell."""
    disk_rate: float = DISK_BYTES_PER_SECOND
    link_rate: float = LINK_BYTES_PER_SECOND
    """Bytes per second from main memory to the device."""
    ranks_rate: float = RANKS_BYTES_PER_SECOND
    """Bytes per second from one process to the others."""
    source: str = ""
    """Where the rates come from, in words; "": from the probe."""
    disk_measured: bool = False
    """The model's own files were read."""
    factor_rate: float | None = None
    """Of factorising, which is K³ / 6; None: as of other matmuls."""

    def factor_seconds(self, k: int) -> float:
        """Factorising the Hessian of `k` columns."""
        return float(k**3 / 6 / (self.factor_rate or self.matmul_rate))


def measure(
    device: Device,
    dtype: str,
    config: QuantizeConfig,
    *,
    attempts: int = _ATTEMPTS,
    min_seconds: float = _MIN_SECONDS,
) -> MachineRates:
    """Probe `device` with numbers of `dtype`; about two seconds, a few megabytes, no global generator.

    Fewer `attempts` in less time make it shorter and less exact.
    """
    import torch

    from gptq_cli.devices.accelerators import synchronize
    from gptq_cli.devices.fp32_matmul import matmul_scope
    from gptq_cli.gptq.hessian import Hessian
    from gptq_cli.gptq.solver import quantize_linears

    place, number = torch.device(str(device)), getattr(torch, dtype)
    waited, ran = waited_seconds(), process_time()

    def seconds_of(work: Callable[[], object]) -> float:
        """Of one call: the fastest of several, since whatever disturbs a call makes it slower."""
        settle = partial(synchronize, place)
        return max(1e-9, fastest(work, attempts=attempts, min_seconds=min_seconds, settle=settle))

    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(place)

    x, w = made(_TOKENS, _K).to(number), made(4 * _K, _K).to(number)
    with matmul_scope(number, place):  # as the engine runs forwards
        forward = seconds_of(lambda: x @ w.T)
    x32, w32 = x.float(), w.float()
    matmul = seconds_of(lambda: x32 @ w32.T)
    with Hessian(_K, place) as moment:
        collect = seconds_of(lambda: moment.add(x))
        hessian = moment.matrix()
    plain = replace(config, group_size=128)
    few, many = made(_LOW_ROWS, _K), made(_HIGH_ROWS, _K)
    low = seconds_of(lambda: quantize_linears([few], hessian, plain))
    high = seconds_of(lambda: quantize_linears([many], hessian, plain))
    multiply_adds = _TOKENS * _K * 4 * _K
    weight_seconds = max(0.0, high - low) / ((_HIGH_ROWS - _LOW_ROWS) * _K)
    return MachineRates(
        forward_rate=multiply_adds / forward,
        hessian_rate=_TOKENS * _K * _K / collect,
        matmul_rate=multiply_adds / matmul,
        column_seconds=max(0.0, low - weight_seconds * _LOW_ROWS * _K) / _K,
        weight_seconds=weight_seconds,
        waited_share=_share_since(waited, ran),
    )


def _share_since(waited: float | None, ran: float) -> float | None:
    """The share of waiting in waiting and working since then. A thread that ended took its waiting along."""
    now = waited_seconds()
    if waited is None or now is None:
        return None
    waiting, working = max(0.0, now - waited), process_time() - ran
    return waiting / (waiting + working) if waiting else 0.0


def rates_of(card: CardRates) -> MachineRates:
    """What a card is taken to do, from its data sheet."""
    half, fast = (REACHED * flops / 2 for flops in (card.half_flops, card.fast_flops))
    return MachineRates(
        forward_rate=half,
        hessian_rate=half / HESSIAN_PART,
        matmul_rate=fast,
        factor_rate=CHOLESKY_REACHED * card.single_flops / 2,
        column_seconds=CARD_COLUMN_SECONDS if card.fused else LAUNCHED_COLUMN_SECONDS,
        weight_seconds=CARD_SOLVE_BYTES / (REACHED * card.memory_rate),
        disk_rate=CARD_DISK_BYTES_PER_SECOND,
        link_rate=REACHED * card.link_rate,
        source=f"from data sheets, {REACHED:.0%} of it reached ({CHOLESKY_REACHED:.0%} in factorisations): "
        f"{card.words}; disk {CARD_DISK_BYTES_PER_SECOND / 1e9:.0f} GB/s; nothing of it was measured",
    )


def rates(
    device: Device,
    facts: ModelFacts,
    work: Work,
    *,
    card: str = "",
    thorough: bool = False,
    shards: Sequence[Path],
) -> MachineRates:
    """Those of the data sheet of a `card`; or of a probe of this machine, of two seconds if `thorough`, and
    of the model's files `shards`."""
    if card:
        return rates_of(CARDS[card])
    attempts, min_seconds = (_ATTEMPTS, _MIN_SECONDS) if thorough else (2, 0.03)
    speed = measure(device, facts.dtype, work.quantize, attempts=attempts, min_seconds=min_seconds)
    disk = read_rate(shards)
    return speed if disk is None else replace(speed, disk_rate=disk, disk_measured=True)
