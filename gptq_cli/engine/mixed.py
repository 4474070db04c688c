"""Linears that share a Hessian, where settings may differ by module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gptq_cli.config import QuantizeConfig
from gptq_cli.gptq.factor import Factor
from gptq_cli.gptq.feedback import OutputMoment
from gptq_cli.gptq.quantized import QuantizedLinear
from gptq_cli.gptq.solver import quantize_linears


def solve_mixed(
    weights: Sequence[Tensor],  # (N_i, K) each
    hessian: Tensor,  # (K, K)
    configs: Sequence[QuantizeConfig],  # one for each weight
    goals: Sequence[Tensor] | None = None,
    factor: Factor | None = None,  # of the Hessian, see `quantize_linears`
    outputs: Sequence[OutputMoment | None] = (),
) -> list[QuantizedLinear]:
    """Those with the same settings are solved together, all with one Hessian. Raises what `quantize_linears`
    raises."""
    solved: dict[int, QuantizedLinear] = {}
    for config in dict.fromkeys(configs):
        places = [place for place, own in enumerate(configs) if own == config]
        found = quantize_linears(
            [weights[place] for place in places],
            hessian,
            config,
            goals=None if goals is None else [goals[place] for place in places],
            factor=factor,
            outputs=[outputs[place] for place in places] if outputs else (),
        )
        solved.update(zip(places, found, strict=True))
    return [solved[place] for place in range(len(configs))]
