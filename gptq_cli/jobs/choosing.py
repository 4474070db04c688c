"""`--bits-per-weight`: a job with a budget of bits becomes one with settings by module.

What can be chosen, and what the file has with every choice, is known from headers. What fewer bits cost has
to be measured once (`engine.bit_losses`); the numbers are kept in the user's cache, so a run that is
interrupted, or has another budget, does without. Until they are there, every weight counts the same: a choice
that says what the job needs, but is not the one that will be made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING

from gptq_cli.calibration import TokenBatches
from gptq_cli.checkpoint.fingerprint import model_digest
from gptq_cli.checkpoint.layout import plan_checkpoint
from gptq_cli.config import DEFAULT_SHARD_BYTES, InspectJob, QuantizeConfig, QuantizeJob
from gptq_cli.engine.bit_losses import measure_bit_losses
from gptq_cli.engine.capture import spread
from gptq_cli.engine.loop import LoopOptions
from gptq_cli.engine.opening import EngineRun
from gptq_cli.events import Observer
from gptq_cli.findings import Finding, PreflightReport
from gptq_cli.jobs.bit_store import Measured, WantedLosses
from gptq_cli.jobs.steps import watched
from gptq_cli.model.describe import model_facts
from gptq_cli.model.facts import ModelFacts
from gptq_cli.model.selection import select_linears
from gptq_cli.model.skeleton import Skeleton
from gptq_cli.model.source import READABLE
from gptq_cli.module_settings import ALLOWED_BITS
from gptq_cli.placement.names import fold
from gptq_cli.placement.placement import Placement
from gptq_cli.placement.schedule import Schedule
from gptq_cli.planning.bits import Bits, Budget, FusedLinears, Spent, fused_linears, settled
from gptq_cli.planning.measuring import (
    hessian_samples,
    measured_windows,
    measuring_needs,
    measuring_seconds,
    tokens_of,
)
from gptq_cli.planning.memory import quantized_bytes
from gptq_cli.planning.rates import MachineRates
from gptq_cli.preflight.resolve import Resolution
from gptq_cli.preflight.rules import bits as rules_bits
from gptq_cli.preflight.rules import targets as rules_targets
from gptq_cli.preflight.rules.quantization import no_linears
from gptq_cli.results.bits import BitChoice, FusedBits, UniformBits

if TYPE_CHECKING:
    from torch import Tensor

MIN_GAIN = 0.1
"""Of mixed bits over the same bits everywhere, as predicted: less is not borne out (docs/quality.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BitSearch:
    """A budget of bits asked of a model: what can be chosen, and what has to be measured."""

    asked: float
    opened: Skeleton
    config: QuantizeConfig
    """As given, with a number for the group size, without the budget."""
    fused: tuple[FusedLinears, ...]
    budget: Budget
    facts: ModelFacts
    """Of the model with everything quantized that can be."""
    head_facts: ModelFacts
    """The same, with the head whether it can be or not."""
    findings: PreflightReport

    @classmethod
    def of(cls, job: QuantizeJob | InspectJob, opened: Skeleton) -> BitSearch | None:
        """That of a job for the model of `opened`; None where no budget is given, or the model
        is refused anyhow."""
        asked = job.quantize.bits_per_weight
        serious = [problem for problem in opened.problems if problem.kind not in READABLE]
        if asked is None or serious or opened.already_quantized or not opened.linears:
            return None
        given = replace(job.quantize, bits_per_weight=None)
        whole = select_linears(opened, replace(given, bits=8, quantize_head=True))
        head, head_facts = whole.head, model_facts(whole)
        if (
            head is not None
            and not given.quantize_head
            and (whole.head_is_tied or not whole.trace.flow.direct or given.tune_epochs)
        ):
            whole = select_linears(opened, replace(given, bits=8, quantize_head=False))
        facts = model_facts(whole)
        config = given.for_columns(
            x.in_features for x in facts.linears if given.of_linear(x.name).group_size == given.group_size
        )
        fused = fused_linears(facts, config, job.targets, job.tp)
        shard_bytes = job.max_shard_bytes if isinstance(job, QuantizeJob) else DEFAULT_SHARD_BYTES
        budget = Budget(fused, cache(partial(_file_bytes, opened, config, fused, shard_bytes)))
        reach = budget.range() if fused else None
        case = rules_bits.BitsCase(
            asked=asked,
            parameters=facts.parameters,
            least_bytes=reach.least_bytes if reach else 0,
            most_bytes=reach.most_bytes if reach and all(None in one.sizes_bytes for one in fused) else None,
            dense_bytes=reach.least_bytes - sum(min(one.sizes_bytes.values()) for one in fused)
            if reach
            else 0,
            targets=job.targets,
            architecture=facts.architecture,
            between=facts.between,
            head=head is not None,
        )
        found = (*rules_bits.bits_measurable(case), *rules_bits.bits_reachable(case)) if fused else ()
        return cls(
            asked=asked,
            opened=opened,
            config=config,
            fused=fused,
            budget=budget,
            facts=facts,
            head_facts=head_facts,
            findings=PreflightReport(found),
        )

    def others(self, findings: PreflightReport) -> PreflightReport:
        """The findings beside those about the budget, without what only follows from one out of reach."""
        found = with_targets(findings).findings
        if any(finding.rule == rules_bits.bits_reachable.id for finding in self.findings.findings):
            found = tuple(finding for finding in found if finding.rule != no_linears.id)
        return PreflightReport(found)

    @property
    def budget_bytes(self) -> int:
        """asked · parameters / 8, rounded down."""
        return int(self.asked * self.facts.parameters / 8)

    def wanted(self, tokens: TokenBatches) -> WantedLosses:
        """What has to be measured, with these tokens."""
        samples, windows = self.texts(tokens)
        return WantedLosses(
            model=model_digest(self.opened),
            tokens=f"{tokens.sha256} {tuple(samples.shape)} {tuple(windows.shape)}",
            config=self.config,
            fused=tuple(one.names for one in self.fused),
        )

    def texts(self, tokens: TokenBatches) -> tuple[Tensor, Tensor]:
        """The samples that Hessians are made of, and the windows on which the divergence is measured: others,
        where there is more than one sample."""
        ids = tokens.input_ids
        used = spread(len(ids), hessian_samples(len(ids), ids.shape[1]))
        others = [number for number in range(len(ids)) if number not in set(used)] or list(used)
        count, length = measured_windows(len(others), ids.shape[1])
        return ids[list(used)], ids[[others[at] for at in spread(len(others), count)], :length]

    def choose(self, measured: Measured | None) -> Spent:
        """The best choice within the budget; the smallest one where nothing fits. The same bits everywhere
        are taken where they fit, and others are predicted to gain less than `MIN_GAIN`."""
        losses: Callable[[FusedLinears, Bits], float] = (
            _by_weights if measured is None else partial(_by_kl, measured)
        )
        found = self.budget.spend(self.budget_bytes, losses)
        if found is None:
            found = self.budget.spend(self.budget.range().least_bytes, losses)
        assert found is not None  # the smallest choice fits its own size
        return self.budget.plainest(found, self.budget_bytes, losses, MIN_GAIN)

    def config_of(self, spent: Spent) -> QuantizeConfig:
        """The job's configuration with these bits."""
        return settled(self.config, self.fused, spent.bits)

    def choice(self, spent: Spent, measured: Measured | None, tokens: TokenBatches | None) -> BitChoice:
        """What a report says of it."""
        losses: Callable[[FusedLinears, Bits], float] = (
            _nothing if measured is None else partial(_by_kl, measured)
        )
        windows = self.texts(tokens)[1] if measured is not None and tokens is not None else None
        return BitChoice(
            asked=self.asked,
            parameters=self.facts.parameters,
            budget_bytes=self.budget_bytes,
            size_bytes=spent.size_bytes,
            measured_tokens=0 if windows is None else windows.numel(),
            fused=tuple(
                FusedBits(
                    linears=_folded(one),
                    weights=one.weights,
                    bits=bits,
                    size_bytes=one.size_at(bits),
                    kl=losses(one, bits),
                )
                for one, bits in zip(self.fused, spent.bits, strict=True)
            ),
            given_modules=tuple(map(str, self.config.modules)),
            quantize_head=self.config.quantize_head,
            uniform=tuple(self._uniform(losses)) if measured is not None else (),
        )

    def _uniform(self, losses: Callable[[FusedLinears, Bits], float]) -> list[UniformBits]:
        found = []
        for bits in ALLOWED_BITS:
            spent = self.budget.uniform(bits)
            if spent is not None:
                kl = sum(losses(one, held) for one, held in zip(self.fused, spent.bits, strict=True))
                found.append(
                    UniformBits(
                        bits=bits,
                        bits_per_parameter=8 * spent.size_bytes / max(1, self.facts.parameters),
                        kl=kl,
                    )
                )
        return found

    def needs(self, job: QuantizeJob, resolution: Resolution) -> PreflightReport:
        """What is found about the memory that measuring takes."""
        if resolution.placement is None or resolution.schedule is None:
            return PreflightReport()
        needs = measuring_needs(
            self.head_facts, resolution.placement, resolution.schedule, resolution.devices, self._tokens(job)
        )
        return PreflightReport(tuple(rules_bits.bits_memory(rules_bits.MeasuringCase(needs=needs))))

    def seconds(self, job: QuantizeJob, speed: MachineRates) -> float:
        """How long measuring will take."""
        return measuring_seconds(self.head_facts, speed, self._tokens(job), self.head_facts.head)

    def _tokens(self, job: QuantizeJob) -> tuple[int, int]:
        return tokens_of(job.calibration.samples, job.calibration.seq_len)

    def measure(
        self, tokens: TokenBatches, placement: Placement, schedule: Schedule, observer: Observer
    ) -> Measured:
        """Run the dense model: the one part of all this that reads weights."""
        samples, windows = self.texts(tokens)
        with_head = select_linears(self.opened, replace(self.config, bits=8, quantize_head=True))
        run = EngineRun(
            skeleton=with_head,
            placement=placement,
            schedule=schedule,
            config=self.config,
            options=LoopOptions(strict=False, devices=watched(placement)),
        )
        return measure_bit_losses(run, [one.names for one in self.fused], samples, windows, observer)


_BITS_CHANGE = ("--bits", "--module", "--no-quantize-head")
"""In a hint: a reader would take other bits."""


def with_targets(findings: PreflightReport) -> PreflightReport:
    """The same where the bits are chosen: a reader that they lose has to be named, and gets what it reads."""

    def hinted(finding: Finding) -> Finding:
        lost = finding.rule == rules_targets.readers_lost.id
        if not lost or not any(change in finding.hint for change in _BITS_CHANGE):
            return finding
        named = " ".join(f"--target {reader}" for reader in finding.subject.split(", "))
        return replace(finding, hint=f"{named}: then only what it reads is chosen")

    return PreflightReport(tuple(map(hinted, findings.findings)))


def _file_bytes(
    opened: Skeleton,
    config: QuantizeConfig,
    fused: Sequence[FusedLinears],
    shard_bytes: int,
    bits: Sequence[Bits],
) -> int:
    """Of all safetensors files of the checkpoint, headers included; of the tensors where none can be read."""
    chosen = settled(config, fused, bits)
    skeleton = select_linears(opened, chosen)
    if not opened.files.tensors:
        return quantized_bytes(model_facts(skeleton), chosen)
    head = skeleton.head.name if skeleton.head is not None else None
    named = ((info.name, info.in_features) for info in skeleton.linears)
    return plan_checkpoint(skeleton, chosen.for_model(named, head), shard_bytes).size_bytes


def _by_kl(measured: Measured, fused: FusedLinears, bits: Bits) -> float:
    return measured[fused.names].predicted(bits)


def _by_weights(fused: FusedLinears, bits: Bits) -> float:
    """Until it is measured: every weight counts the same, and a bit makes its error half as large."""
    return 0.0 if bits is None else fused.weights * 4.0**-bits


def _nothing(fused: FusedLinears, bits: Bits) -> float:
    return 0.0


def _folded(fused: FusedLinears) -> tuple[str, ...]:
    """The names of its linears; experts, of which there are many, by kind."""
    block = fused.linears[0].block
    if not fused.linears[0].routed:
        return fused.names
    return tuple(dict.fromkeys(block + fold(name.removeprefix(block)) for name in fused.names))
