"""What would be quantized of an architecture at the size that its config class has by default.

The files are hollow (`tests/fabricated.py`): names and shapes, no values, so one of 671 B parameters takes
seconds and no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import CONFIG_MAPPING

from gptq_cli.config import ModelRef, QuantizeConfig
from gptq_cli.model.find import find_model
from gptq_cli.model.selection import select_linears
from gptq_cli.model.skeleton import open_skeleton
from tests.architectures import model_class
from tests.fabricated import fabricate


@dataclass(frozen=True, kw_only=True)
class DefaultSize:
    """The plan for one architecture."""

    parameters: int
    share: float
    """Quantized part of the two- and three-dimensional weights inside decoder blocks, 0 to 1."""
    dense: tuple[tuple[str, str, float], ...]
    """(folded name, reason, part of those weights) of what stays dense there, the largest first."""


def default_size(model_type: str, folder: Path) -> DefaultSize:
    """Raises what Transformers raises where the class has no default, and `ModelError`."""
    fabricate(CONFIG_MAPPING[model_type](), folder, shards=1, model_class=model_class(model_type))
    ref = ModelRef(model=str(folder))
    skeleton = select_linears(
        open_skeleton(find_model(ref), ref), QuantizeConfig.of("balanced", group_size="auto")
    )
    inside = tuple(f"{block}." for block in skeleton.blocks)
    counted: set[int] = set()
    total = 0
    for name, parameter in skeleton.model.named_parameters():
        if parameter.ndim in (2, 3) and name.startswith(inside) and id(parameter) not in counted:
            counted.add(id(parameter))
            total += parameter.numel()
    done = sum(linear.in_features * linear.out_features for linear in skeleton.linears)
    dense = [
        (item.name, item.reason, item.parameters / max(1, total))
        for item in skeleton.dense
        if item.name.startswith(f"{skeleton.blocks_prefix}.") and item.reason != "vector"
    ]
    return DefaultSize(
        parameters=skeleton.parameters,
        share=done / max(1, total),
        dense=tuple(sorted(dense, key=lambda item: -item[2])),
    )
