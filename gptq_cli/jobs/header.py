"""What a run says before its first weight is read: what will be done, where, and how long it will take."""

from __future__ import annotations

from gptq_cli.calibration import TokenBatches
from gptq_cli.config import QuantizeJob
from gptq_cli.events import RunStarted
from gptq_cli.gptq.matmul import fast_matmul_supported
from gptq_cli.jobs.checking import Checked
from gptq_cli.jobs.steps import passes_words
from gptq_cli.jobs.together import ranks_words
from gptq_cli.model.facts import ModelFacts
from gptq_cli.model.skeleton import Skeleton
from gptq_cli.placement.device import CPU
from gptq_cli.placement.placement import Placement
from gptq_cli.placement.schedule import Schedule
from gptq_cli.planning.time import Estimate, time_words
from gptq_cli.planning.words import streaming_words
from gptq_cli.preflight.report import group_reason
from gptq_cli.ranks.joining import Joined
from gptq_cli.results.bits import BitChoice
from gptq_cli.wording import number_of


def header(
    job: QuantizeJob,
    checked: Checked,
    placement: Placement,
    schedule: Schedule,
    tokens: TokenBatches,
    estimate: Estimate | None,
    *,
    finished: int = 0,
    trial: int | None = None,
    joined: Joined | None = None,
) -> RunStarted:
    """The event. `finished`: blocks that an earlier run did; `trial`: blocks that alone are worked on,
    `schedule` still being that of the whole; `joined`: the ranks that work together."""
    skeleton, facts = checked.skeleton, checked.facts
    whole = " for the whole model" if trial is not None else " for what is left" if finished else ""
    config = checked.work.quantize
    reason = group_reason(job.quantize.group_size)
    group = f"group {config.group_columns}{f' ({reason})' if reason else ''}"
    zeros = "symmetric" if config.sym else "asymmetric"
    worked_on = frozenset(block.name for block in schedule.blocks[:trial])
    return RunStarted(
        command="quantize",
        model=job.model.model,
        out=job.out if trial is None else None,
        settings=(
            *((("source", facts.decoded.words),) if facts.decoded is not None else ()),
            ("bits", f"{_bits_words(config.bits, checked.bits)}, {group}, {zeros}"),
            ("order", "desc_act" if config.desc_act else config.act_order),
            ("dtype", _dtype_words(skeleton, facts, placement)),
            ("calibration", f"{tokens.samples} x {tokens.seq_len} tokens of {tokens.source}"),
            ("placement", placement.reason),
            *((("ranks", ranks_words(joined.members)),) if joined and joined.launch.size > 1 else ()),
            ("streaming", "; ".join(streaming_words(facts, placement, schedule))),
            ("passes", passes_words(schedule)),
            *(
                (("trial", f"the first {trial} of {number_of(len(skeleton.blocks), 'block')}"),)
                if trial is not None
                else ()
            ),
            ("time", f"{time_words(estimate)}{whole}"),
        ),
        devices=tuple(str(device) for device in placement.devices),
        blocks=len(worked_on),
        linears=sum(trial is None or linear.block in worked_on for linear in skeleton.packed),
        seconds=estimate.left_seconds if estimate is not None and trial is None else None,
    )


def _bits_words(bits: int, choice: BitChoice | None) -> str:
    """`4`, or how a budget was spent."""
    if choice is None:
        return str(bits)
    used = {"dense" if one.bits is None else str(one.bits) for one in choice.fused}
    return f"{', '.join(sorted(used))} ({choice.bits_per_parameter:.4f} of {choice.asked:g} per parameter)"


def _dtype_words(skeleton: Skeleton, facts: ModelFacts, placement: Placement) -> str:
    """The dtype of the model, and that of its matmuls where the processor is slow at them in the model's."""
    dtype = facts.dtype
    if placement.main_device == CPU and not fast_matmul_supported(skeleton.dtype, "cpu"):
        return f"{dtype}, multiplied in float32: this cpu does not multiply {dtype} natively"
    return dtype
