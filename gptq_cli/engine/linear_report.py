"""What a run says of one quantized linear, in a block or as the head: its report, and that it fell back
or was lost."""

from __future__ import annotations

from torch import Tensor

from gptq_cli.config import QuantizeConfig
from gptq_cli.errors import LinearLost, NotPositiveDefinite
from gptq_cli.events import Observer, Warned
from gptq_cli.gptq.choice import StepChoice
from gptq_cli.gptq.quantized import QuantizedLinear
from gptq_cli.model.skeleton import LinearInfo
from gptq_cli.results.run import LinearReport
from gptq_cli.wording import all_of, number_of

NO_STEP = StepChoice()
"""That of a linear which is solved for its own output."""


LOST = 0.9
"""A linear with this relative error of its output or more is hardly there any longer."""
_SMALL_SCALE = 2.0**-14
"""Where numbers of float16 begin to lose digits."""


def linear_report(
    info: LinearInfo,
    config: QuantizeConfig,
    quantized: QuantizedLinear,
    *,
    tokens: int,
    seconds: float,
    step: StepChoice = NO_STEP,
    routed: bool = False,
    pooled: float = 0.0,
) -> LinearReport:
    """The report of the linear `info`, quantized by its own `config`; the rest as in `LinearReport`."""
    return LinearReport(
        name=info.name,
        in_features=info.in_features,
        out_features=info.out_features,
        bits=config.bits,
        group_size=config.group_columns,
        loss=quantized.loss,
        rtn_loss=quantized.rtn_loss,
        damp_percent=quantized.damp_percent,
        attempts=quantized.attempts,
        method=quantized.method,
        alpha=step.alpha,
        target_damp_percent=step.damp_percent if step.alpha else None,
        moved=step.moved if step.alpha else None,
        bounded_rows=step.bounded_rows,
        tokens=tokens,
        routed=routed,
        pooled=pooled,
        seconds=seconds,
    )


def dense_hint(name: str, *, head: bool) -> str:
    """What leaves a linear dense, or the head."""
    return "leave --quantize-head out" if head else f"leave it dense: --module {name}=dense"


def check_fallback(
    info: LinearInfo, quantized: QuantizedLinear, tokens: int, observer: Observer, *, strict: bool
) -> None:
    """Warn of a linear that was rounded to nearest. Raises `NotPositiveDefinite` where that is forbidden."""
    if quantized.method == "gptq":
        return
    why, hint = _why_rounded(quantized, tokens)
    if strict:
        raise NotPositiveDefinite(f"{info.name!r} would fall back to round-to-nearest: {why}", hint=hint)
    observer(Warned(f"{info.name!r} falls back to round-to-nearest: {why}", hint))


def check_lost(
    info: LinearInfo,
    loss: float,  # of the linear
    scales: Tensor,  # all of them
    observer: Observer,
    *,
    strict: bool,
) -> None:
    """Warn of a linear of which hardly anything is left. Raises `LinearLost` where `strict` forbids that."""
    if loss < LOST:
        return
    largest = scales.abs().max().item()
    small = f": its weights are so small that float16 does not hold their scales, {largest:.2g} the largest"
    why = (
        f"{info.name!r} is lost, the relative error of its output is {loss:.4f}"
        f"{small if largest < _SMALL_SCALE else ''}"
    )
    hint = dense_hint(info.name, head=not info.block)
    if strict:
        raise LinearLost(why, hint=hint)
    observer(Warned(why, hint))


def _why_rounded(quantized: QuantizedLinear, tokens: int) -> tuple[str, str]:
    """The reason, and what to do."""
    more = "calibrate with more or more varied text (--samples, --calibration)"
    if quantized.attempts == 0 and tokens == 0:
        return "no calibration token reached it", more
    if quantized.attempts == 0:
        return (
            f"every input of it is 0, for {all_of(tokens, 'token')}",
            "a linear or norm before it has weights that are all 0, or too small: look for a warning about "
            "it, or compare the model's files with their source",
        )
    return (
        f"its Hessian is not positive definite up to damping {quantized.damp_percent:g} "
        f"({number_of(quantized.attempts, 'attempt')}, {number_of(tokens, 'token')})",
        f"{more}, or raise --damp-percent",
    )
