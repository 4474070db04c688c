"""The report of `gptq load`: where the model runs, how close to the dense one, how fast, how sound."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from gptq_cli.findings import Finding, PreflightReport
from gptq_cli.readers import Target
from gptq_cli.wording import and_others

Outcome = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Quantized and dense model on the same windows: means over all tokens, or over those of answers."""

    json_properties: ClassVar[tuple[str, ...]] = ("perplexity_gap",)

    kl: float
    """KL(dense ‖ quantized), nats per token."""
    top1: float
    """Share of tokens for which both models predict the same next token, 0 to 1."""
    perplexity: float
    """Of the quantized model, over the predicted tokens (the first of a window is context only)."""
    dense_perplexity: float
    tokens: int
    windows: int

    @property
    def perplexity_gap(self) -> float:
        """How much higher the quantized model's perplexity is, as a fraction of the dense model's."""
        return self.perplexity / self.dense_perplexity - 1 if self.dense_perplexity else math.nan


@dataclass(frozen=True, slots=True)
class Rate:
    """Tokens per second: median and interquartile range of the rounds."""

    tokens_per_second: float
    spread: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """The speed of one model."""

    prompt: Rate
    decode: Rate
    prompt_tokens: int
    new_tokens: int
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Speed and weights of the quantized model, and of the dense one where there is one to compare with."""

    json_properties: ClassVar[tuple[str, ...]] = ("prompt_ratio", "decode_ratio", "weight_ratio")

    speed: Speed
    weight_bytes: int
    memory: tuple[tuple[str, int], ...]
    """(device, allocated bytes after the rounds; resident set size on cpu), the dense model not yet there."""
    dense_speed: Speed | None = None
    dense_weight_bytes: int | None = None

    @property
    def prompt_ratio(self) -> float | None:
        """Prompt tokens per second over the dense model's; above 1 is faster."""
        return _ratio(self.speed.prompt, self.dense_speed.prompt if self.dense_speed else None)

    @property
    def decode_ratio(self) -> float | None:
        """Decoded tokens per second over the dense model's; above 1 is faster."""
        return _ratio(self.speed.decode, self.dense_speed.decode if self.dense_speed else None)

    @property
    def weight_ratio(self) -> float | None:
        """Bytes of the weights over the dense model's; below 1 is smaller."""
        return self.weight_bytes / self.dense_weight_bytes if self.dense_weight_bytes else None


def _ratio(ours: Rate, dense: Rate | None) -> float | None:
    """None where there is nothing to compare with."""
    return ours.tokens_per_second / dense.tokens_per_second if dense and dense.tokens_per_second else None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """One metric of one task of lm-evaluation-harness."""

    json_properties: ClassVar[tuple[str, ...]] = ("lost",)

    task: str
    metric: str
    """As the harness calls it: "acc", "acc_norm", "exact_match (strict-match)"."""
    value: float
    stderr: float | None
    """Standard error of `value`; None where the harness has none."""
    higher_is_better: bool
    samples: int | None
    """Questions that were asked; None for a mean over tasks."""
    shots: int | None
    """Examples in front of each question."""
    dense: float | None = None
    """Of the dense model, where that was measured too."""

    @property
    def lost(self) -> float | None:
        """How much worse it is than the dense model's; below 0: better."""
        if self.dense is None:
            return None
        return self.dense - self.value if self.higher_is_better else self.value - self.dense


@dataclass(frozen=True, slots=True)
class Gate:
    """A limit on a measurement, and what was found."""

    json_properties: ClassVar[tuple[str, ...]] = ("passed",)

    name: str
    """The option: "max_kl", "max_perplexity", "min_score"."""
    limit: float
    found: float
    subject: str = ""
    """The task that "min_score" is about."""

    @property
    def passed(self) -> bool:
        """True when what was found is a number within the limit."""
        return self.found >= self.limit if self.name.startswith("min_") else self.found <= self.limit

    @property
    def option(self) -> str:
        """`--max-kl 0.05`, `--min-score arc_easy=0.4`: as it was given."""
        about = f"{self.subject}=" if self.subject else ""
        return f"--{self.name.replace('_', '-')} {about}{self.limit:g}"

    @property
    def failure(self) -> str:
        """`kl is 0.0813, above --max-kl 0.05`."""
        measured = self.subject or self.name.removeprefix("max_")
        beyond = "below" if self.name.startswith("min_") else "above"
        return f"{measured} is {self.found:.4g}, {beyond} {self.option}"


@dataclass(frozen=True, slots=True)
class RuleResult:
    """The result of one rule, or of the check of one part of a checkpoint."""

    json_properties: ClassVar[tuple[str, ...]] = ("outcome",)

    rule: str
    about: str
    """What was checked, one clause."""
    findings: tuple[Finding, ...]

    @property
    def outcome(self) -> Outcome:
        """The worst level of the findings; "ok" without any."""
        levels = {finding.level for finding in self.findings}
        worst: tuple[Outcome, ...] = ("error", "warning", "note")
        return next((level for level in worst if level in levels), "ok")


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetReport:
    """Whether one reader will take the checkpoint, rule by rule."""

    json_properties: ClassVar[tuple[str, ...]] = ("ok",)

    target: Target
    rules: tuple[RuleResult, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The findings of its rules, in their order."""
        return tuple(finding for result in self.rules for finding in result.findings)

    @property
    def ok(self) -> bool:
        """True when no rule has an error."""
        return all(result.outcome != "error" for result in self.rules)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What --verify and --target found, from the files alone."""

    json_properties: ClassVar[tuple[str, ...]] = ("ok", "findings")

    path: str
    checks: tuple[RuleResult, ...]
    """Part by part; parts that could not be checked are missing. Only "files" where nothing but targets was
    asked for."""
    targets: tuple[TargetReport, ...] = ()
    tensors: int | None = None
    """This and the following are None where the files cannot be read."""
    linears: int | None = None
    size_bytes: int | None = None
    coverage: float | None = None
    """Share of the weights of all linears in the blocks that is packed, 0 to 1."""
    warnings: tuple[str, ...] = ()
    """All that were given: the findings of that level, and what else came up on the way."""

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Everything that the checks found (targets have their own), errors first."""
        found = tuple(finding for check in self.checks for finding in check.findings)
        return PreflightReport(found).ordered()

    @property
    def sound(self) -> bool:
        """True when no check found an error, whatever the targets say."""
        return all(check.outcome != "error" for check in self.checks)

    @property
    def failures(self) -> tuple[str, ...]:
        """What is wrong, one clause each; empty: exit 0, else 5."""
        errors = [finding for finding in self.findings if finding.level == "error"]
        unsound = (
            (f"the files are not sound: {self._words(errors[0])}{and_others(errors)}",) if errors else ()
        )
        return unsound + tuple(
            f"{target.target} will not take it" for target in self.targets if not target.ok
        )

    def _words(self, finding: Finding) -> str:
        """A finding in one clause, with what it is about: stderr and logs hold no table."""
        named = finding.subject in ("", self.path) or finding.subject in finding.message
        return finding.message if named else f"{finding.subject}: {finding.message}"

    @property
    def ok(self) -> bool:
        """True when the checkpoint is sound and every target takes it."""
        return self.sound and all(target.ok for target in self.targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCount:
    """How many linears run on which kernel."""

    kernel: str
    linears: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """The result of `gptq load`: what was opened, where, and what was measured."""

    json_properties: ClassVar[tuple[str, ...]] = ("ok",)

    path: str
    quantizer: str
    """`meta.quantizer` of the checkpoint, "" when it names none."""
    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    checkpoint_format: str
    linears: int
    device_map: str
    device_reason: str
    dtype: str
    use_cuda_fp16: bool
    kernels: tuple[KernelCount, ...]
    load_seconds: float
    weight_bytes: int
    memory: tuple[tuple[str, int], ...]
    """(device, allocated bytes after loading; resident set size on cpu)."""
    prompt: str | None = None
    text: str | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    tokens_per_second: float | None = None
    """Of the tokens after the first; None where there is only one."""
    perplexity: float | None = None
    windows: int | None = None
    seq_len: int | None = None
    answers_only: bool | None = None
    """The text is conversations, and only the tokens of their answers were counted."""
    text_source: str | None = None
    """What was measured on."""
    against: str | None = None
    agreement: Agreement | None = None
    tasks: tuple[TaskScore, ...] = ()
    """Of lm-evaluation-harness; a task's main metric first."""
    bench: Bench | None = None
    gates: tuple[Gate, ...] = ()
    """The limits that were asked for; "passed" where the checkpoint is within."""
    verification: VerifyReport | None = None
    compiled: bool = False
    warnings: tuple[str, ...] = ()
    """All that were given: by preflight, while opening, and while measuring."""

    @property
    def failures(self) -> tuple[str, ...]:
        """Failed gates, and what verification found wrong, one clause each; empty: exit 0, else 5."""
        verified = self.verification.failures if self.verification else ()
        return verified + tuple(gate.failure for gate in self.gates if not gate.passed)

    @property
    def ok(self) -> bool:
        """True when nothing failed."""
        return not self.failures
