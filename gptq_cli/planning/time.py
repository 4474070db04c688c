"""How long a job will take: what its blocks cost (costs.py) at the rates of this machine (rates.py), and

    reading   the bytes of the files once from the disk; those of a block that is read ahead only as far as
              the block before it takes less time
    head      a Hessian, and solves as for a block, where it is quantized, for each of its pieces of rows
    gradients the pass through the dense model that comes first (fisher.py), what it reads and keeps in files
    tuning    its forwards and gradients (tuning.py)

It is an estimate: see rates.py for what moves it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptq_cli.model.facts import LinearFact, ModelFacts
from gptq_cli.placement.device import Device
from gptq_cli.placement.names import parents
from gptq_cli.placement.schedule import HEAD_ROWS, Schedule
from gptq_cli.planning.cases import Work
from gptq_cli.planning.costs import MULTIPLY_ADDS, SHORT_COLUMNS, block_costs
from gptq_cli.planning.fisher import FILE_TURNS, file_bytes, gradient_tokens, pass_multiply_adds
from gptq_cli.planning.rates import MachineRates, rates
from gptq_cli.planning.share import own_items, samples_share
from gptq_cli.planning.tuning import tuning_multiply_adds
from gptq_cli.wording import busy_words, duration_words

DECODED_PER_SECOND = 70e6
"""Weights in few bits that one processor core decodes: 60 (MXFP4) to 90 million (FP8) were measured."""
START_SECONDS = 4.0
"""Opening, tokenizing, writing what is small."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What an earlier start of a job finished."""

    blocks: int = 0
    """The first ones of the model."""
    gradients: bool = False
    """Those of the dense model are taken."""
    tuned: bool = False


NOTHING_DONE = Done()


def job_seconds(
    facts: ModelFacts, work: Work, schedule: Schedule, speed: MachineRates, *, done: Done = NOTHING_DONE
) -> float:
    """The counting part: seconds of the whole job at `speed`, without what is `done`."""
    files_bytes = facts.tensor_files_bytes or facts.size_bytes
    working = list(block_seconds(facts, work, schedule, speed).values())[done.blocks :]
    reading = _block_bytes(facts) * _stored(facts) / speed.disk_rate
    total = START_SECONDS + files_bytes / speed.disk_rate
    total += facts.decoded.elements / DECODED_PER_SECOND if facts.decoded is not None else 0.0
    total += sum(working)
    if schedule.reads_ahead:  # while the block before is worked on
        total -= sum(min(reading, seconds) for seconds in working[:-1])
    if not done.gradients and done.blocks < len(facts.blocks):
        total += gradient_seconds(facts, work, speed)
    total += 0.0 if done.tuned else tuning_seconds(facts, work, speed)
    return total + (_head_seconds(facts.head, work, speed) if facts.head is not None else 0.0)


def gradient_seconds(facts: ModelFacts, work: Work, speed: MachineRates) -> float:
    """Of the pass before the blocks: it reads them twice; 0 where no gradients are taken."""
    if not gradient_tokens(work):
        return 0.0
    read = 2 * len(facts.blocks) * _block_bytes(facts) * _stored(facts) + FILE_TURNS * file_bytes(facts, work)
    return pass_multiply_adds(facts, work) / speed.forward_rate + read / speed.disk_rate


def tuning_seconds(facts: ModelFacts, work: Work, speed: MachineRates) -> float:
    """Its forwards and gradients; 0 where nothing is tuned."""
    return tuning_multiply_adds(facts, work) / speed.forward_rate if work.quantize.tune_epochs else 0.0


def _head_seconds(head: LinearFact, work: Work, speed: MachineRates) -> float:
    """Its Hessian, and the solves of its pieces; the forward stops where it begins."""
    k, pieces = head.in_features, -(-head.out_features // HEAD_ROWS)
    own = own_items(work, pieces)
    size = head.out_features * k * own / pieces
    solve = own * (speed.column_seconds * k + speed.factor_seconds(k)) + speed.weight_seconds * size
    solve += MULTIPLY_ADDS * size * max(0, k - SHORT_COLUMNS) / speed.matmul_rate
    tokens = work.calibration.samples * work.calibration.seq_len * samples_share(work)
    return tokens * k**2 / speed.hessian_rate + solve


def _stored(facts: ModelFacts) -> float:
    """Bytes in the files for each byte of the model's dtype."""
    return (facts.tensor_files_bytes or facts.size_bytes) / max(1, facts.size_bytes)


def _block_bytes(facts: ModelFacts) -> float:
    """Bytes of a block on average."""
    blocks = frozenset(facts.blocks)
    inside = sum(t.size_bytes for t in facts.tensors if not blocks.isdisjoint(parents(t.name)))
    return inside / max(1, len(facts.blocks))


def block_seconds(facts: ModelFacts, work: Work, schedule: Schedule, speed: MachineRates) -> dict[str, float]:
    """Seconds of each block at `speed`."""
    return {name: cost.total for name, cost in block_costs(facts, work, schedule, speed).items()}


def quick_estimate(
    facts: ModelFacts,
    work: Work,
    schedule: Schedule,
    device: Device,
    *,
    done: Done = NOTHING_DONE,
    shards: Sequence[Path] = (),
) -> Estimate | None:
    """For a header, from a probe of under a second; `done`: by an earlier start; `shards`: the model's
    files. None for what takes less than `SHORT_SECONDS` even on a slow machine."""
    if job_seconds(facts, work, schedule, _SLOW, done=done) < SHORT_SECONDS:
        return None
    return estimate(facts, work, schedule, rates(device, facts, work, shards=shards), done)


def estimate(
    facts: ModelFacts, work: Work, schedule: Schedule, speed: MachineRates, done: Done = NOTHING_DONE
) -> Estimate:
    """How long quantizing the model of `facts` will take at `speed`; `done`: by an earlier start."""
    return Estimate(
        seconds=job_seconds(facts, work, schedule, speed),
        left_seconds=job_seconds(facts, work, schedule, speed, done=done),
        block_seconds=block_seconds(facts, work, schedule, speed),
        waited_share=speed.waited_share,
        source=speed.source or _probe_words(speed),
    )


def _probe_words(speed: MachineRates) -> str:
    busy = busy_words(speed.waited_share)
    how = "are what the model's files give" if speed.disk_measured else "from the disk are assumed"
    disk = f"{speed.disk_rate / 1e9:.2g} GB/s {how}"
    return f"an estimate from a short probe of this machine{f'; {busy}' if busy else ''}; {disk}"


def time_words(estimate: Estimate | None) -> str:
    """`about 12 min`: of what is left to do; and whether the probe found the machine busy."""
    if estimate is None:
        return "less than a minute"
    busy = busy_words(estimate.waited_share)
    return f"about {duration_words(estimate.left_seconds)}{f' ({busy})' if busy else ''}"
