"""What tuning takes (`engine.tuning`): memory on each device, and multiply-adds.

With b = bytes of a number in the model's dtype, h = hidden size, T = tokens of the paired samples, S = those
of a step, t = those of a micro-batch in it:

    on the main device    all outside the blocks, head included; TUNE_LOGITS logits, LOGIT_BYTES for each
    where a block runs    what stays dense in the blocks there
                          MOVING_BYTES for each of their scales
                          the largest of them decoded: DECODED_BYTES + DECODED_COPIES · b for each weight
                          t · (GRADIENT_HIDDEN · h + GRADIENT_ROWS · ΣR) · 4: what its backward holds,
                          R of experts by the share of tokens that comes to them, or whole where
                          all are multiplied at once,
                          and GRADIENT_SCORES · seq_len more for each head whose scores are a tensor
    where states rest     T · h · b of the dense stream; what enters every block for a step, and gradients:
                          (blocks + 2) · S · h · b; or twice the held-out samples

A step runs forward, runs again and goes back through every block: FORWARDS forwards, as many as four of the
blocks. Behind the blocks logits are made twice, and go back once. What it takes to decode the weights is not
counted: little beside 2048 tokens, but not for experts of which each sees a few of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from gptq_cli.model.facts import LinearFact, ModelFacts
from gptq_cli.placement.device import Device
from gptq_cli.placement.names import parents
from gptq_cli.placement.placement import Placement
from gptq_cli.placement.schedule import TUNE_HELD_OUT, TUNE_LOGITS, TUNE_STEP_TOKENS, Schedule
from gptq_cli.planning.cases import Work
from gptq_cli.planning.schedule import block_linears

MOVING_BYTES = 22
DECODED_BYTES, DECODED_COPIES = 9, 3
GRADIENT_HIDDEN, GRADIENT_ROWS, GRADIENT_SCORES = 12, 2, 4
LOGIT_BYTES = 32
"""For each of TUNE_LOGITS logits: in fp32, with their softmax and gradients."""
FORWARDS, HEAD_FORWARDS = 4, 3
LOOKS = 3
"""Forwards of the held-out samples: before, and with all and half of what was tuned."""


def head_weights(facts: ModelFacts) -> int:
    """Of the head that makes logits."""
    return facts.vocab_size * facts.hidden_size


def backward_bytes(facts: ModelFacts, rows: int, tokens: int, seq_len: int, number_bytes: int = 4) -> int:
    """What the backward of a block holds of a micro-batch of `tokens`. `rows`: ΣN of its linears;
    `number_bytes`: of a number on its way, 4 where weights have gradients too."""
    numbers = GRADIENT_HIDDEN * facts.hidden_size + GRADIENT_ROWS * rows
    scores = GRADIENT_SCORES * facts.score_heads * seq_len
    return tokens * (number_bytes * numbers + 4 * scores)


def logit_bytes(facts: ModelFacts) -> int:
    """Of the logits that are made at a time, and of their gradients."""
    return LOGIT_BYTES * max(TUNE_LOGITS, facts.vocab_size)


def tuning_bytes(
    facts: ModelFacts, work: Work, placement: Placement, schedule: Schedule, device: Device
) -> int:
    """What `device` holds while the model is tuned."""
    return sum(_parts(facts, work, placement, schedule, device))


def _parts(
    facts: ModelFacts, work: Work, placement: Placement, schedule: Schedule, device: Device
) -> Iterator[int]:
    b, h = facts.dtype_bytes, facts.hidden_size
    blocks = frozenset(facts.blocks)
    runs_there = {block.name for block in schedule.blocks if block.execution_device == device}
    packed = {name for linear in facts.packed for name in (f"{linear.name}.weight", linear.part_of)}
    dense = [tensor for tensor in facts.tensors if tensor.name not in packed]
    if device == placement.main_device:
        yield sum(t.size_bytes for t in dense if blocks.isdisjoint(parents(t.name)))
        yield logit_bytes(facts)
    yield sum(t.size_bytes for t in dense if not runs_there.isdisjoint(parents(t.name)))
    samples = work.paired_samples
    step = max(schedule.seq_len, TUNE_STEP_TOKENS)
    micro_batch = min(schedule.micro_batch_tokens, step)
    largest = scales = 0
    for block, linears in block_linears(facts).items():
        if block in runs_there:
            weights = sum(x.in_features * x.out_features for x in linears)
            rows = round(sum(x.out_features * (1.0 if x.together else _share(facts, x)) for x in linears))
            backward = backward_bytes(facts, rows, micro_batch, schedule.seq_len)
            largest = max(largest, (DECODED_BYTES + DECODED_COPIES * b) * weights + backward)
            scales += sum(
                x.out_features * work.quantize.of_linear(x.name).groups(x.in_features) for x in linears
            )
    yield largest + MOVING_BYTES * scales
    if any(block.activation_device == device for block in schedule.blocks):
        held = max(1, samples // TUNE_HELD_OUT) * schedule.seq_len
        entering = max((len(facts.blocks) + 2) * step, 2 * held)
        yield b * h * (samples * schedule.seq_len + entering)


def tuning_multiply_adds(facts: ModelFacts, work: Work) -> float:
    """Of the whole tuning, as a forward counts them."""
    samples = work.paired_samples
    held = max(1, samples // TUNE_HELD_OUT)
    blocks = sum(x.in_features * x.out_features * _share(facts, x) for x in facts.linears)
    step = FORWARDS * blocks + HEAD_FORWARDS * head_weights(facts)
    look = blocks + 2 * head_weights(facts)
    passes = work.quantize.tune_epochs * (samples - held) * step + LOOKS * held * look
    return float(work.calibration.seq_len * passes)


def _share(facts: ModelFacts, linear: LinearFact) -> float:
    """The share of the tokens that comes to a linear."""
    return facts.routed_share if linear.routed else 1.0
