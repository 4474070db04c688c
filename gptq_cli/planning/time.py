"""How long a job will take, estimated from about two seconds of work on this machine.

The probe runs the real things on made-up numbers: a matmul as in a forward, a Hessian, and two solves of
different height, from which the price of a column and the price of a weight follow. The rest is counting:

    forward   weights of the block · tokens, for each time a block runs (once parked, more when replayed)
    Hessian   K² · tokens for each stage; experts see the share of the tokens that their router's top-k says
    head      the same for its pieces of rows, where it is quantized
    solve     a · K + b · R · K for each stage (R rows), and its matmuls: (MULTIPLY_ADDS · R · K² + K³) / rate
              a · K once for experts that are solved side by side
    reading   the bytes of the files once from the disk; those of a block that is read ahead only as far as
              the block before it takes less time; on an accelerator also once over the link to main memory,
              and hidden states that rest in main memory once for each time the forward runs

It is an estimate: clocks and caches may move it by a factor of two, and other work on the machine by more, so
the probe also notes how long its threads waited for a processor. For a card that is named and not there, the
rates are those of its data sheet, and the share of them that is reached is assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import process_time
from typing import TYPE_CHECKING

from gptq_cli.config import QuantizeConfig
from gptq_cli.devices.host_threads import waited_seconds
from gptq_cli.model.facts import LinearFact, ModelFacts
from gptq_cli.placement.cards import CARDS, CardRates
from gptq_cli.placement.device import Device
from gptq_cli.placement.names import parents
from gptq_cli.placement.schedule import HEAD_ROWS, BlockSchedule, Schedule
from gptq_cli.planning.cases import Work
from gptq_cli.planning.memory import hidden_bytes
from gptq_cli.planning.schedule import StageShape, block_stages, expert_families
from gptq_cli.timing import fastest
from gptq_cli.wording import busy_words, duration_words

if TYPE_CHECKING:
    from torch import Tensor

MULTIPLY_ADDS = 8
"""Multiply-adds per weight and column, over the solve: feedback, sweeps, losses."""
DISK_BYTES_PER_SECOND = 500e6
LINK_BYTES_PER_SECOND = 12e9
"""From main memory to an accelerator: the older generation of PCIe, until it is measured."""
REACHED = 0.5
"""The part of a data sheet's rates that a run is taken to reach. An assumption."""
CARD_COLUMN_SECONDS = 40e-6
"""A step of the solver's loop over columns on a card: some launches of kernels. An assumption."""
CARD_SOLVE_BYTES = 80
"""What the solve of a weight reads and writes in the card's memory. An assumption."""
CARD_DISK_BYTES_PER_SECOND = 2e9
"""Beside a card that is named: an NVMe disk."""
DECODED_PER_SECOND = 70e6
"""Weights in few bits that one processor core decodes: 60 (MXFP4) to 90 million (FP8) were measured."""
START_SECONDS = 4.0
"""Opening, tokenizing, writing what is small."""
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
    source: str = ""
    """Where the rates come from, in words; "": from the probe."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run should take."""

    seconds: float
    """Of the whole job."""
    left_seconds: float
    """Of what an earlier start did not finish."""
    block_seconds: Mapping[str, float]
    waited_share: float | None = None
    """See `MachineRates`."""
    source: str = ""
    """What it is counted from, in words."""


SHORT_SECONDS = 60.0
_SLOW = MachineRates(
    forward_rate=2e9, hessian_rate=2e9, matmul_rate=2e9, column_seconds=1e-3, weight_seconds=2e-7
)
"""A slow machine: what takes less than `SHORT_SECONDS` there is not worth a probe."""


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
    half, single = (REACHED * flops / 2 for flops in (card.half_flops, card.single_flops))
    return MachineRates(
        forward_rate=half,
        hessian_rate=half,
        matmul_rate=single,
        column_seconds=CARD_COLUMN_SECONDS,
        weight_seconds=CARD_SOLVE_BYTES / (REACHED * card.memory_rate),
        disk_rate=CARD_DISK_BYTES_PER_SECOND,
        link_rate=REACHED * card.link_rate,
        source=f"from data sheets, {REACHED:.0%} of it reached: {card.words}; disk "
        f"{CARD_DISK_BYTES_PER_SECOND / 1e9:.0f} GB/s; nothing of it was measured",
    )


def job_seconds(
    facts: ModelFacts, work: Work, schedule: Schedule, speed: MachineRates, *, finished: int = 0
) -> float:
    """The counting part: seconds of the whole job at `speed`, without its first `finished` blocks."""
    files_bytes = facts.tensor_files_bytes or facts.size_bytes
    working = list(block_seconds(facts, work, schedule, speed).values())[finished:]
    reading = _block_bytes(facts) * files_bytes / max(1, facts.size_bytes) / speed.disk_rate
    total = START_SECONDS + files_bytes / speed.disk_rate
    total += facts.decoded.elements / DECODED_PER_SECOND if facts.decoded is not None else 0.0
    total += sum(working)
    if schedule.reads_ahead:  # while the block before is worked on
        total -= sum(min(reading, seconds) for seconds in working[:-1])
    tokens = work.calibration.samples * work.calibration.seq_len
    return total + (_head_seconds(facts.head, tokens, speed) if facts.head is not None else 0.0)


@dataclass(frozen=True, slots=True)
class BlockCost:
    """Seconds of one block, by what they depend on."""

    samples: float
    """Forwards and Hessians: every sample costs the same."""
    rows: float
    """Of the solve: every row of weights costs the same."""
    factors: float
    """Factorising every Hessian."""
    columns: float
    """Walking over columns, however few rows there are."""
    travel: float = 0.0
    """Weights, and hidden states that rest in main memory, on their way to an accelerator."""

    @property
    def total(self) -> float:
        """All of them, in one process."""
        return self.samples + self.rows + self.factors + self.columns + self.travel


def _block_bytes(facts: ModelFacts) -> float:
    """Bytes of a block on average."""
    blocks = frozenset(facts.blocks)
    inside = sum(t.size_bytes for t in facts.tensors if not blocks.isdisjoint(parents(t.name)))
    return inside / max(1, len(facts.blocks))


def block_seconds(facts: ModelFacts, work: Work, schedule: Schedule, speed: MachineRates) -> dict[str, float]:
    """Seconds of each block at `speed`."""
    return {name: cost.total for name, cost in block_costs(facts, work, schedule, speed).items()}


def block_costs(
    facts: ModelFacts, work: Work, schedule: Schedule, speed: MachineRates
) -> dict[str, BlockCost]:
    """What each block costs at `speed`."""
    tokens = work.calibration.samples * work.calibration.seq_len
    streams = 1 + work.quantize.paired_samples(work.calibration.samples) / work.calibration.samples
    known: dict[tuple[tuple[StageShape, ...], BlockSchedule], BlockCost] = {}
    costs = {}
    for name, stages in block_stages(facts).items():
        block = replace(schedule.block(name), name="")
        if (stages, block) not in known:
            weights = _weights_run(stages, block, facts.routed_share)
            columns = speed.column_seconds * _columns_walked(stages, block)
            travel = _travelled_bytes(facts, work, stages, block, streams) / speed.link_rate
            cost = _block_cost(stages, tokens, speed, streams, weights, facts.routed_share)
            known[stages, block] = replace(cost, columns=columns, travel=travel)
        costs[name] = known[stages, block]
    return costs


def _travelled_bytes(
    facts: ModelFacts, work: Work, stages: Sequence[StageShape], block: BlockSchedule, streams: float
) -> float:
    """What goes from main memory to the device that works on a block, and back."""
    if not block.execution_device.is_accelerator:
        return 0.0
    travelled = float(facts.dtype_bytes * sum(stage.rows * stage.in_features for stage in stages))
    if block.activations_on_host:
        passes = 2 + sum(not stage.routed for stage in stages)
        travelled += passes * streams * hidden_bytes(facts, work)
    return travelled


def _head_seconds(head: LinearFact, tokens: int, speed: MachineRates) -> float:
    """Its Hessian, and the solves of its pieces; the forward stops where it begins."""
    k, pieces = head.in_features, -(-head.out_features // HEAD_ROWS)
    solve = pieces * (speed.column_seconds * k + k**3 / speed.matmul_rate)
    size = head.out_features * k
    solve += speed.weight_seconds * size + MULTIPLY_ADDS * size * max(0, k - _K) / speed.matmul_rate
    return tokens * k**2 / speed.hessian_rate + solve


def _block_cost(
    stages: Sequence[StageShape],
    tokens: int,
    speed: MachineRates,
    streams: float,
    weights_run: float,
    routed_share: float,
) -> BlockCost:
    weights = [stage.rows * stage.in_features for stage in stages]
    forward = streams * tokens * weights_run / speed.forward_rate
    squares = sum(stage.in_features**2 * (routed_share if stage.routed else 1.0) for stage in stages)
    collect = streams * tokens * squares / speed.hessian_rate
    rows = factors = 0.0
    for stage, size in zip(stages, weights, strict=True):
        k = stage.in_features
        rows += speed.weight_seconds * size + MULTIPLY_ADDS * size * max(0, k - _K) / speed.matmul_rate
        factors += k**3 / speed.matmul_rate
    return BlockCost(samples=forward + collect, rows=rows, factors=factors, columns=0.0)


def _columns_walked(stages: Sequence[StageShape], block: BlockSchedule) -> int:
    """Steps of the solver's loop over columns: K for each stage, and K for experts that are solved side by
    side."""
    columns = sum(stage.in_features for stage in stages if not stage.routed)
    for stage, count in expert_families(stages).items():
        k, per_batch = stage.in_features, block.experts_per_batch(stage.in_features)
        together = block.experts_per_solve(k, stage.rows)
        whole, rest = divmod(count, per_batch)
        columns += k * (whole * -(-per_batch // together) + -(-rest // together))
    return columns


def _weights_run(stages: Sequence[StageShape], block: BlockSchedule, routed_share: float) -> float:
    """Weights that a token is multiplied with in a block, counted for each time its forward runs.

    Parked forwards run once. Replayed ones run up to each stage, and at last to the end; where stages are
    collected together, in one pass; and for each batch of experts, to the end. Of the experts' weights the
    share counts that a token is routed to.
    """
    weights = [stage.rows * stage.in_features * (routed_share if stage.routed else 1.0) for stage in stages]
    if block.parked:
        return sum(weights)
    once = [weight for stage, weight in zip(stages, weights, strict=True) if not stage.routed]
    if block.replayed == "not-sequential":
        run = sum(weights) if once else 0
    else:
        run = sum(sum(once[:index]) for index in range(len(once)))
    experts = expert_families(stages).items()
    batches = sum(-(-count // block.experts_per_batch(stage.in_features)) for stage, count in experts)
    return run + (batches + 1) * sum(weights)


def quick_estimate(
    facts: ModelFacts, work: Work, schedule: Schedule, device: Device, *, finished: int = 0
) -> Estimate | None:
    """For a header, from a probe of under a second; `finished`: blocks that are done already. None for what
    takes less than `SHORT_SECONDS` even on a slow machine."""
    if job_seconds(facts, work, schedule, _SLOW, finished=finished) < SHORT_SECONDS:
        return None
    speed = measure(device, facts.dtype, work.quantize, attempts=2, min_seconds=0.03)
    return estimate(facts, work, schedule, speed, finished)


def rates(device: Device, facts: ModelFacts, work: Work, *, card: str, thorough: bool) -> MachineRates:
    """Those of the data sheet of a `card`; or of a probe of this machine, of two seconds if `thorough`."""
    if card:
        return rates_of(CARDS[card])
    if thorough:
        return measure(device, facts.dtype, work.quantize)
    return measure(device, facts.dtype, work.quantize, attempts=2, min_seconds=0.03)


def estimate(
    facts: ModelFacts, work: Work, schedule: Schedule, speed: MachineRates, finished: int = 0
) -> Estimate:
    """How long quantizing the model of `facts` will take at `speed`; `finished`: blocks that are done."""
    return Estimate(
        seconds=job_seconds(facts, work, schedule, speed),
        left_seconds=job_seconds(facts, work, schedule, speed, finished=finished),
        block_seconds=block_seconds(facts, work, schedule, speed),
        waited_share=speed.waited_share,
        source=speed.source or _probe_words(speed),
    )


def _probe_words(speed: MachineRates) -> str:
    busy = busy_words(speed.waited_share)
    disk = f"{speed.disk_rate / 1e9:g} GB/s from the disk are assumed"
    return f"an estimate from a short probe of this machine{f'; {busy}' if busy else ''}; {disk}"


def time_words(estimate: Estimate | None) -> str:
    """`about 12 min`: of what is left to do; and whether the probe found the machine busy."""
    if estimate is None:
        return "less than a minute"
    busy = busy_words(estimate.waited_share)
    return f"about {duration_words(estimate.left_seconds)}{f' ({busy})' if busy else ''}"
