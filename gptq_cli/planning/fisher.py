"""What it takes to weigh errors by the dense model's gradients (`gptq.feedback`): memory, disk, operations.

With b = bytes of a number in the model's dtype, h = hidden size, F = tokens of the samples that are gone back
through, t = those of a micro-batch; a linear has N outputs, in panels of n = N / ceil(N / PANEL_ROWS):

    the pass    before the blocks are worked on, forward and back through the dense model, block by block
        where a block runs    its weights, and the backward of a micro-batch: as in tuning.py, without
                              gradients of weights
        on the main device    all outside the blocks, head included; logits as in tuning.py
        in the files          blocks · F · h · max(b, 2): what enters each block, then its gradient in
                              bfloat16, until the checkpoint is complete
    in a block  A of every linear that runs once per token, until the block is finished: 4 · N · n
        before its stages     once more the backward of a micro-batch
        in a solve            PANEL_COPIES · 4 · n² for each linear of the stage, and 4 · R · K for the errors
                              of all its rows

The pass runs each block forward, again with gradients, and back: PASS_FORWARDS forwards, and reads it twice;
in a block it is BLOCK_FORWARDS, and A costs N · n for each token. A solve walks over the columns once for
each part of a linear (`walks`), multiplies N · n / 2 · K to make up for errors, and factorises N · n² / 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gptq_cli.model.facts import ModelFacts
from gptq_cli.placement.device import Device
from gptq_cli.placement.names import parents
from gptq_cli.placement.placement import Placement
from gptq_cli.placement.schedule import PANEL_ROWS, PART_ROWS, PARTS, Schedule
from gptq_cli.planning.cases import Work
from gptq_cli.planning.schedule import StageShape, block_stages
from gptq_cli.planning.tuning import backward_bytes, logit_bytes

PANEL_COPIES = 2
PASS_FORWARDS, HEAD_FORWARDS, BLOCK_FORWARDS = 4, 3, 3
FILE_TURNS = 4
"""What is in the files is written and read twice: what enters the blocks, and gradients."""


def gradient_tokens(work: Work) -> int:
    """Tokens that are gone back through; 0 where none are."""
    data = work.calibration
    return work.quantize.fisher_samples(data.samples, data.seq_len) * data.seq_len


def file_bytes(facts: ModelFacts, work: Work) -> int:
    """What lies in the working folder beside the checkpoint."""
    return len(facts.blocks) * gradient_tokens(work) * facts.hidden_size * max(facts.dtype_bytes, 2)


def panel_rows(rows: int) -> int:
    """n of a linear of N = `rows`."""
    return -(-rows // -(-rows // PANEL_ROWS))


def walks(stage: StageShape) -> int:
    """How often the solve of a stage walks over its columns."""
    return max((_parts(rows) for rows in stage.outputs), default=1)


def _parts(rows: int) -> int:
    """Of a linear, panel by panel."""
    size, part = panel_rows(rows), max(PART_ROWS, -(-rows // PARTS))
    whole, rest = divmod(rows, size)
    return whole * -(-size // part) + -(-rest // part)


def moment_numbers(stages: Iterable[StageShape]) -> int:
    """Numbers of A, of all linears of a block."""
    return sum(rows * panel_rows(rows) for stage in stages for rows in stage.outputs)


def solve_bytes(stage: StageShape) -> int:
    """What the solve of a stage holds beside."""
    panels = sum(panel_rows(rows) ** 2 for rows in stage.outputs)
    return 4 * (PANEL_COPIES * panels + stage.rows * stage.in_features)


def feedback_multiply_adds(stage: StageShape) -> float:
    """Of making up for errors, in the solve of a stage."""
    return sum(rows * panel_rows(rows) / 2 for rows in stage.outputs) * stage.in_features


def factor_multiply_adds(stage: StageShape) -> float:
    """Of factorising A, in the solve of a stage."""
    return sum(rows * panel_rows(rows) ** 2 / 3 for rows in stage.outputs)


def block_backward_bytes(
    facts: ModelFacts, stages: Iterable[StageShape], micro_batch_tokens: int, seq_len: int
) -> int:
    """What going back through a block of these stages holds; of experts what its share of the tokens does."""
    rows = sum(stage.rows * (facts.routed_share if stage.routed else 1.0) for stage in stages)
    return backward_bytes(facts, round(rows), micro_batch_tokens, seq_len)


def pass_bytes(
    facts: ModelFacts, placement: Placement, schedule: Schedule, device: Device, weights_bytes: int
) -> int:
    """What `device` holds during the pass beside hidden states and the next block. `weights_bytes`: of the
    blocks that are there at once."""
    held = weights_bytes
    backward = max(
        (
            block_backward_bytes(facts, stages, schedule.micro_batch_tokens, schedule.seq_len)
            for name, stages in block_stages(facts).items()
            if schedule.block(name).execution_device == device
        ),
        default=0,
    )
    if device != placement.main_device:
        return held + backward
    blocks = frozenset(facts.blocks)
    held += sum(t.size_bytes for t in facts.tensors if blocks.isdisjoint(parents(t.name)))
    return held + max(backward, logit_bytes(facts))


def run_weights(stages: Sequence[StageShape], routed_share: float) -> float:
    """Weights that a token is multiplied with in one forward of a block."""
    return sum(stage.rows * stage.in_features * (routed_share if stage.routed else 1.0) for stage in stages)


def pass_multiply_adds(facts: ModelFacts, work: Work) -> float:
    """Of the pass, as a forward counts them."""
    blocks = sum(run_weights(stages, facts.routed_share) for stages in block_stages(facts).values())
    head = facts.vocab_size * facts.hidden_size
    return gradient_tokens(work) * (PASS_FORWARDS * blocks + HEAD_FORWARDS * head)
