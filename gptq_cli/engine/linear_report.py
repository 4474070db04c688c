"""What the report says of one quantized linear, in a block or as the head."""

from __future__ import annotations

from gptq_cli.config import QuantizeConfig
from gptq_cli.gptq.goal import StepChoice
from gptq_cli.gptq.quantized import QuantizedLinear
from gptq_cli.model.skeleton import LinearInfo
from gptq_cli.results.run import LinearReport

NO_STEP = StepChoice()
"""That of a linear which is solved for its own output."""


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
        tokens=tokens,
        routed=routed,
        pooled=pooled,
        seconds=seconds,
    )
