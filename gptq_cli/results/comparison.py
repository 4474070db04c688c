"""`gptq report DIR DIR …`: what is known of several checkpoints, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from gptq_cli.results.load import TaskScore
from gptq_cli.results.run import Setting

Origin = Literal["report.json", "config", "load --json"]
"""Where the figures are from; "config": the quantization config and the sizes of the files alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One checkpoint. None: it is not known, or was not measured."""

    path: str
    origin: Origin
    model: str | None = None
    settings: tuple[tuple[str, Setting], ...]
    """Every setting that is known, the text and the dtype included."""
    size_bytes: int | None = None
    """Of all safetensors files."""
    size_before_bytes: int | None = None
    bits_per_weight: float | None = None
    bits_per_parameter: float | None = None
    loss: float | None = None
    """The mean of all linears."""
    rtn_loss: float | None = None
    fallbacks: int | None = None
    block_losses: tuple[tuple[str, float | None], ...] = ()
    """The mean of each block."""
    kl: float | None = None
    top1: float | None = None
    perplexity: float | None = None
    dense_perplexity: float | None = None
    measured_on: str | None = None
    """The text of these figures, with the number of windows."""
    tasks: tuple[TaskScore, ...] = ()
    prompt_rate: float | None = None
    """Tokens per second."""
    decode_rate: float | None = None
    seconds: float | None = None
    peak_bytes: tuple[tuple[str, int], ...] = ()
    warnings: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Several checkpoints, in the order in which they were named."""

    json_properties: ClassVar[tuple[str, ...]] = ("differing", "cautions")

    runs: tuple[Compared, ...]

    @property
    def differing(self) -> tuple[str, ...]:
        """Settings that are known of two checkpoints at least and are not the same in all of those."""
        names = dict.fromkeys(name for run in self.runs for name, _ in run.settings)
        return tuple(name for name in names if len({repr(value) for value in self.known(name)}) > 1)

    def known(self, name: str) -> list[Setting]:
        """The values of a setting in the checkpoints of which it is known."""
        return [dict(run.settings)[name] for run in self.runs if name in dict(run.settings)]

    @property
    def cautions(self) -> tuple[str, ...]:
        """Why some figures do not compare, one sentence each."""
        models = {run.model for run in self.runs if run.model is not None}
        texts = {run.measured_on for run in self.runs if run.measured_on is not None}
        found = []
        if len(models) > 1:
            found.append("the models differ: " + ", ".join(sorted(models)))
        if len(texts) > 1:
            found.append("KL and perplexity were measured on different texts: " + ", ".join(sorted(texts)))
        other = {"calibration sha256", "solve_for", "dense_share", "fisher_tokens"}
        if other & set(self.differing):
            found.append("losses have another goal or text in each run: compare KL rather than losses")
        if any(run.origin == "config" for run in self.runs):
            found.append("of a checkpoint without report.json only its config and its size are known")
        return tuple(found)
