"""What it takes to weigh errors by the dense model's gradients (`gptq.feedback`): memory, disk, operations.

With b = bytes of a number in the model's dtype, h = hidden size, F = tokens of the samples that are gone back
through, t = those of a micro-batch; a linear has N outputs, in panels of n = N / ceil(N / PANEL_ROWS):

    the pass    before all else, forward and back through the dense model, block by block; the largest of
        where a block runs    its weights, the next one, and the backward of a micro-batch: as in tuning.py,
                              but in numbers of b bytes, because weights have no gradients
        behind the blocks     on the main device all that lies outside them, head included; logits as there,
                              of a sample at most
        where states rest     F · h · b beside either, and on the cpu once more: what entered the block that
                              is gone back through
        in the files          blocks · F · h · b, and a block's once more while it is written: what enters
                              each block, then the gradients at its output, until the checkpoint is complete
    in a block  A of every linear that runs once per token, 4 · N · n, until its stage is solved
        before its stages     once more the backward of a micro-batch
        in a solve            4 · n² for each linear of the stage, and once more while one is factorised;
                              goals and errors of all rows and their codes: PARTED_BYTES · R · K; and
                              SOLVE_BYTES · K for the rows that are solved at a time

The pass runs each block forward, again with gradients, and back: PASS_FORWARDS forwards, and reads it twice;
in a block it is BLOCK_FORWARDS, and A costs N · n for each token, as H does K². A solve walks over the
columns once for each part of a linear (`walks`), multiplies N · n / 2 · K to make up for errors, and
factorises N · n² / 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gptq_cli.model.facts import ModelFacts
from gptq_cli.placement.device import CPU, Device
from gptq_cli.placement.names import parents
from gptq_cli.placement.placement import Placement
from gptq_cli.placement.schedule import SOLVE_BYTES, Schedule, panel_rows, part_rows
from gptq_cli.planning.cases import Work
from gptq_cli.planning.schedule import StageShape, block_stages
from gptq_cli.planning.tuning import LOGIT_BYTES, backward_bytes, logit_bytes

PARTED_BYTES = 9
PASS_FORWARDS, HEAD_FORWARDS, BLOCK_FORWARDS = 4, 3, 3
FILE_TURNS = 4
"""What is in the files is written and read twice: what enters the blocks, and gradients."""


def gradient_tokens(work: Work) -> int:
    """Tokens that are gone back through; 0 where none are."""
    data = work.calibration
    return work.quantize.fisher_samples(data.samples, data.seq_len) * data.seq_len


def state_bytes(facts: ModelFacts, work: Work) -> int:
    """Of the hidden states of these tokens, or of their gradients."""
    return gradient_tokens(work) * facts.hidden_size * facts.dtype_bytes


def file_bytes(facts: ModelFacts, work: Work) -> int:
    """What lies in the working folder beside the checkpoint."""
    return (len(facts.blocks) + 1) * state_bytes(facts, work)


def walks(stage: StageShape) -> int:
    """How often the solve of a stage walks over its columns."""
    return max((_parts(rows) for rows in stage.outputs), default=1)


def _parts(rows: int) -> int:
    """Of a linear, panel by panel."""
    size, part = panel_rows(rows), part_rows(rows)
    whole, rest = divmod(rows, size)
    return whole * -(-size // part) + -(-rest // part)


def moment_numbers(stages: Iterable[StageShape]) -> int:
    """Numbers of A, of all linears of these stages."""
    return sum(rows * panel_rows(rows) for stage in stages for rows in stage.outputs)


def solve_bytes(stage: StageShape) -> int:
    """What the solve of a stage holds beside A, in place of SOLVE_BYTES for each weight."""
    panels = [panel_rows(rows) ** 2 for rows in stage.outputs]
    at_a_time = stage.rows - sum(rows - min(rows, part_rows(rows)) for rows in stage.outputs)
    rows_bytes = PARTED_BYTES * stage.rows + SOLVE_BYTES * at_a_time
    return 4 * (sum(panels) + max(panels, default=0)) + stage.in_features * rows_bytes


def feedback_multiply_adds(stage: StageShape) -> float:
    """Of making up for errors, in the solve of a stage."""
    return sum(rows * panel_rows(rows) / 2 for rows in stage.outputs) * stage.in_features


def factor_multiply_adds(stage: StageShape) -> float:
    """Of factorising A, in the solve of a stage."""
    return sum(rows * panel_rows(rows) ** 2 / 3 for rows in stage.outputs)


def block_backward_bytes(
    facts: ModelFacts, stages: Iterable[StageShape], micro_batch_tokens: int, seq_len: int
) -> int:
    """What going back through a block of these stages holds; of experts what their share of the tokens does,
    or all of them where the experts are multiplied at once."""
    rows = sum(
        stage.rows * (facts.routed_share if stage.routed and not stage.together else 1.0) for stage in stages
    )
    return backward_bytes(facts, round(rows), micro_batch_tokens, seq_len, facts.dtype_bytes)


def pass_bytes(
    facts: ModelFacts, work: Work, placement: Placement, schedule: Schedule, device: Device, blocks_bytes: int
) -> int:
    """What `device` holds at the highest moment of the pass. `blocks_bytes`: of the weights of blocks that
    are there at once, the next one included."""
    rests = any(block.activation_device == device for block in schedule.blocks)
    states = state_bytes(facts, work) * ((1 if rests else 0) + (1 if device == CPU else 0))
    backward = max(
        (
            block_backward_bytes(facts, stages, schedule.micro_batch_tokens, schedule.seq_len)
            for name, stages in block_stages(facts).items()
            if schedule.block(name).execution_device == device
        ),
        default=0,
    )
    inside = blocks_bytes + backward
    if device != placement.main_device:
        return states + inside
    names = frozenset(facts.blocks)
    outside = sum(t.size_bytes for t in facts.tensors if names.isdisjoint(parents(t.name)))
    logits = min(logit_bytes(facts), LOGIT_BYTES * schedule.seq_len * facts.vocab_size)
    return states + max(inside, outside + logits)


def run_weights(stages: Sequence[StageShape], routed_share: float) -> float:
    """Weights that a token is multiplied with in one forward of a block."""
    return sum(stage.rows * stage.in_features * (routed_share if stage.routed else 1.0) for stage in stages)


def pass_multiply_adds(facts: ModelFacts, work: Work) -> float:
    """Of the pass, as a forward counts them."""
    blocks = sum(run_weights(stages, facts.routed_share) for stages in block_stages(facts).values())
    head = facts.vocab_size * facts.hidden_size
    return gradient_tokens(work) * (PASS_FORWARDS * blocks + HEAD_FORWARDS * head)
