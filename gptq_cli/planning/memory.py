"""How many bytes the work on a block takes beside the weights, at its highest moment.

With T = samples · seq_len tokens (of a rank: its samples), t = tokens of one micro-batch, b = bytes of a
number in the model's dtype, h = hidden size; a stage has K input columns and R = ΣN rows:

    activations  T · h · b, the inputs of the block, which its outputs replace micro-batch by micro-batch;
                 where the model's own forwards are kept open between the blocks (`engine.driven`)
                 T · OPEN_HIDDEN · h · b;
                 with parked forwards also what their frames hold between two stages: the normed input and
                 the widest K, with the residual behind attention where that is behind it, or the outputs of
                 the first stage, the K of the second and the scores of attention, where they are tensors
                 (seq_len for each head): T · (h + …) · b;
                 on the cpu twice that where one piece is less than HEAP_PIECE_BYTES: small pieces live on the
                 C heap, and what is freed between them stays resident; in main memory where they rest there
    and the largest of these moments, over all stages of the block:
        collect  Hessian   4 · K²
                 working   t · (IN_FLIGHT_HIDDEN · h + IN_FLIGHT_ROWS · max R) · b: a micro-batch on its way;
                           at least IN_FLIGHT_COLUMNS · K instead of IN_FLIGHT_ROWS · R where an MLP is not
                           gated (R < 2 · K), for activation functions in several steps;
                           t · seq_len · SCORE_BYTES for each head whose scores are a tensor;
                           and CHUNK_BYTES: activations widened to fp32
        solve    Hessian   8 · K²: H and the factor of the damped H
                 working   SOLVE_BYTES · R · K: weights, errors and their copy in original order, in fp32
        pack     Hessian   4 · K²
                 packing   PACK_BYTES · R · K: codes, what is left of the solve, words
    experts, which see the tokens routed to them, are collected in batches of c, with one H for the tokens of
    all, and e of them are solved side by side (c and e: `experts_per_batch` and `experts_per_solve`):
        collect  Hessian   (c + 1) · 4 · K²
        solve    Hessian   (c + 1 + e + 1) · 4 · K²: the H of e of them copied side by side, a factor each
                 working   SOLVE_BYTES · e · R · K
        pack     packing   (PACK_BYTES + CODE_BYTES · (e - 1)) · R · K
    without true-sequential stages the H of every other stage of the block is there at once: 4 · ΣK²
    solving for the dense model's output (`solve_for`): activations of the share of the samples that is run
    twice, a dense copy of the block's linears, instead of H two of it and two cross moments of C numbers (K²,
    or R · K for a single linear with R at most K / 2, or above K), and one more moment:
        goal     Hessian   4 · (GOAL_SQUARES · K² + 2 · C): the four, H and a factor
                 working   GOAL_BYTES · R · K; and 4 · R · K for the goals while solving
    of several ranks each has its part of the R rows, or of the experts of a batch, in its solve and goals,
    with the weights of all rows beside; and the codes of all while it packs (share.py)
    errors that are weighed by gradients (`fisher_tokens`) add one moment before all these, and to each of
    them what fisher.py counts
    a quantized head is one more moment on its device: its Hessian, and HEAD_ROWS of its rows at a time
    several ranks add to every collect, and as one more moment, what leaf_sums.py counts; of experts a rank
    has then the H of its own alone, that of the pool, and that of all of a batch

Weights, and what a device holds in all: device_plans.py. Micro-batch, parked or replayed, where a block is
worked on and where activations rest are read from the `Schedule`. The constants were measured (docs/rules.md
says how); each run's report sets prediction beside measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.model.facts import LinearFact, ModelFacts
from gptq_cli.placement.schedule import HEAD_ROWS, SOLVE_BYTES, BlockSchedule, Schedule
from gptq_cli.planning.cases import Work
from gptq_cli.planning.fisher import block_backward_bytes, gradient_tokens, moment_numbers, solve_bytes
from gptq_cli.planning.leaf_sums import TRIANGLE, expert_sum_bytes, leaf_sum_bytes
from gptq_cli.planning.schedule import StageShape, block_stages, expert_families
from gptq_cli.planning.share import own_items, own_rows, own_samples

MIB = 1 << 20
PACK_BYTES = 10
CODE_BYTES = 2
GOAL_BYTES = 16
GOAL_SQUARES = 4
IN_FLIGHT_HIDDEN = 6
IN_FLIGHT_ROWS = 2
IN_FLIGHT_COLUMNS = 6
SCORE_BYTES = 14
"""For a score: scores, what they become with cap, bias or mask, and their softmax in fp32. Measured: 10.3
(Gemma 2) and 13.7 (BLOOM)."""
OPEN_HIDDEN = 2
"""Hidden states that a forward of the model holds which is kept open between the blocks: those that enter the
block, and the embeddings."""
CHUNK_BYTES = 128 * MIB
CPU_BASELINE_BYTES = 450 * MIB
"""Resident set of the interpreter with torch, transformers and accelerate imported and a tokenizer loaded."""
TOKENIZER_TOKENS, TOKENIZER_BYTES = 50_000, 1280
"""That is with a tokenizer of 50,000 tokens; each further one takes 1280 bytes (measured: Gemma 3, 262,144).
Their number is taken from `vocab_size` in config.json."""
ACCELERATOR_BASELINE_BYTES = 768 * MIB
"""Device context, library workspaces, and what the caching allocator cannot hand out again."""


def cpu_baseline_bytes(facts: ModelFacts) -> int:
    """What a process that works on the model takes of main memory before any weight."""
    return CPU_BASELINE_BYTES + TOKENIZER_BYTES * max(0, facts.vocab_size - TOKENIZER_TOKENS)


@dataclass(frozen=True, slots=True)
class WorkSet:
    """What working on one block needs beside the weights that rest on the device, at the largest moment."""

    working_bytes: int = 0
    hessian_bytes: int = 0
    packing_bytes: int = 0
    activation_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All four parts."""
        return self.working_bytes + self.hessian_bytes + self.packing_bytes + self.activation_bytes


def work_set(
    facts: ModelFacts,
    stages: tuple[StageShape, ...],
    work: Work,
    block: BlockSchedule,
    micro_batch_tokens: int,
) -> WorkSet:
    """The bytes that quantizing one block of these stages needs."""
    if not stages:
        return WorkSet()
    t, b = micro_batch_tokens, facts.dtype_bytes
    dense = work.quantize.solve_for == "dense"
    numbers = facts.hidden_size * (OPEN_HIDDEN if facts.between else 1)
    numbers += _parked_numbers(facts, stages, work) if block.parked else 0
    held = own_samples(work).held * work.calibration.seq_len * b * numbers
    activations = 0 if block.activations_on_host else held
    copy = b * sum(stage.in_features * stage.rows for stage in stages) if dense else 0
    weighed = gradient_tokens(work) > 0
    flight = t * b * (IN_FLIGHT_HIDDEN * facts.hidden_size + _widest_numbers(stages, facts.hidden_size))
    flight += t * work.calibration.seq_len * SCORE_BYTES * facts.score_heads
    once = [stage for stage in stages if not stage.routed]
    all_kept = sum(_kept_bytes(stage, dense=dense) for stage in once)
    all_travel = [size for stage in once for size in _travelling_bytes(stage, dense=dense)]
    moments = []
    if weighed:
        backward = block_backward_bytes(facts, stages, t, work.calibration.seq_len)
        resting = 0 if block.activations_on_host else held // numbers * facts.hidden_size  # nothing is parked
        moments.append(WorkSet(copy + backward, 4 * moment_numbers(stages), 0, resting))
    for stage, count in expert_families(stages).items():
        widened = min(CHUNK_BYTES, 4 * t * stage.in_features)
        moments += _expert_moments(stage, count, block, copy, flight + widened, activations, work)
    for index, stage in enumerate(once):
        output_moments = 4 * moment_numbers(once[index:]) if weighed else 0
        weights, square = stage.rows * stage.in_features, 4 * stage.in_features**2
        kept = _kept_bytes(stage, dense=dense)
        others = output_moments + (0 if work.quantize.true_sequential else all_kept - kept)
        widened = min(CHUNK_BYTES, 4 * t * stage.in_features)
        travel = _travelling_bytes(stage, dense=dense) if work.quantize.true_sequential else all_travel
        sums = leaf_sum_bytes(work.ranks, travel, work.rank)
        own = own_rows(work, stage.rows) * stage.in_features
        beside = 4 * (weights - own)
        solving = (4 if dense else 0) * own + (solve_bytes(stage) if weighed else SOLVE_BYTES * own)
        moments += [
            WorkSet(copy + flight + widened, others + kept + sums.collecting, 0, activations),
            WorkSet(copy, others + kept + sums.exchanging, 0, activations),
            WorkSet(copy + solving, others + 2 * square, 0, activations),
            WorkSet(copy, others + square, PACK_BYTES * weights, activations),
        ]
        if dense:
            goal = GOAL_SQUARES * square + 2 * _cross_bytes(stage)
            moments.append(WorkSet(copy + GOAL_BYTES * own + beside, others + goal, 0, activations))
    return max(moments, key=lambda moment: moment.total_bytes)


def _widest_numbers(stages: tuple[StageShape, ...], hidden_size: int) -> int:
    """Numbers per token between two stages, where they are most."""
    rows = IN_FLIGHT_ROWS * max(stage.rows for stage in stages)
    behind_attention = pairwise(stages[1:])
    plain = [after.in_features for before, after in behind_attention if before.rows < 2 * after.in_features]
    return max(rows, IN_FLIGHT_COLUMNS * max((k for k in plain if k > hidden_size), default=0))


def _kept_bytes(stage: StageShape, *, dense: bool) -> int:
    """Of one stage while it is collected: H; or two of it, for kept and held-out samples, and two cross
    moments."""
    square = 4 * stage.in_features**2
    return 2 * square + 2 * _cross_bytes(stage) if dense else square


def _travelling_bytes(stage: StageShape, *, dense: bool) -> list[float]:
    """Of each moment of one stage, as ranks tell each other of it."""
    triangle = TRIANGLE * 4 * stage.in_features**2
    return [triangle, triangle, *[_cross_bytes(stage)] * 2] if dense else [triangle]


def _cross_bytes(stage: StageShape) -> int:
    k, rows = stage.in_features, stage.rows
    return 4 * k * (rows if stage.alone and (2 * rows <= k or rows > k) else k)


def _expert_moments(
    stage: StageShape,
    count: int,
    block: BlockSchedule,
    copy: int,
    flight: int,
    activations: int,
    work: Work,
) -> list[WorkSet]:
    """The moments of `count` experts of one kind: collected in batches, dealt out, solved side by side."""
    weights, square = stage.rows * stage.in_features, 4 * stage.in_features**2
    collected = min(count, block.experts_per_batch(stage.in_features))
    own = own_items(work, collected)
    together = min(max(1, own), block.experts_per_solve(stage.in_features, stage.rows))
    held = (collected + 1) * square
    exchanged = (own + 2) * square if work.ranks else 0  # with the pool, and the sum of all of this batch
    sums = expert_sum_bytes(work.ranks, TRIANGLE * square, collected, work.rank)
    alone = work.ranks < 2  # else the codes of all experts come at once, when every H has been used
    packing = (PACK_BYTES + CODE_BYTES * ((together if alone else collected) - 1)) * weights
    solved = (own + 1 + together + 1) * square
    return [
        WorkSet(copy + flight, held + sums.collecting, 0, activations),
        WorkSet(copy, exchanged + sums.exchanging, 0, activations),
        WorkSet(copy + SOLVE_BYTES * together * weights, solved, 0, activations),
        WorkSet(copy, held if alone else square, packing, activations),
    ]


def hidden_bytes(facts: ModelFacts, work: Work) -> int:
    """Bytes of the hidden states of all samples, in one stream."""
    return work.calibration.samples * sample_bytes(facts, work)


def sample_bytes(facts: ModelFacts, work: Work) -> int:
    """Bytes of the hidden states of a sample, in one stream."""
    return work.calibration.seq_len * facts.hidden_size * facts.dtype_bytes


def _parked_numbers(facts: ModelFacts, stages: tuple[StageShape, ...], work: Work) -> int:
    """Numbers per token that the frames of parked forwards hold beside the block's input, at the widest
    stage."""
    scores = facts.scores_kept * facts.score_heads * work.calibration.seq_len
    widest = max(stage.in_features for stage in stages)
    attention = stages[1].in_features + stages[0].rows if len(stages) > 1 else 0
    # the sum behind attention: the block's input stays beside it until the block's output takes its place
    behind = facts.hidden_size + max((stage.in_features for stage in stages[2:]), default=0)
    return facts.hidden_size + max(widest, attention + scores, behind)


def work_sets(facts: ModelFacts, work: Work, schedule: Schedule) -> dict[str, WorkSet]:
    """The work set of every block."""
    known: dict[tuple[tuple[StageShape, ...], bool, bool, int], WorkSet] = {}
    found = {}
    for name, stages in block_stages(facts).items():
        block = schedule.block(name)
        key = (stages, block.parked, block.activations_on_host, block.expert_batch_bytes)
        if key not in known:
            known[key] = work_set(facts, stages, work, block, schedule.micro_batch_tokens)
        found[name] = known[key]
    return found


def packed_bytes(linear: LinearFact, config: QuantizeConfig) -> int:
    """Bytes of qweight, qzeros, scales and g_idx of one linear. `config`: that of the whole model."""
    config = config.of_linear(linear.name)
    k, n, groups = linear.in_features, linear.out_features, config.groups(linear.in_features)
    words = -(-k * config.bits // 32) * n + groups * -(-n * config.bits // 32) + k
    return 4 * words + 2 * groups * n


def quantized_bytes(facts: ModelFacts, config: QuantizeConfig) -> int:
    """Bytes of all tensors of the checkpoint to be written."""
    config = Work(config, CalibrationConfig()).on(facts).quantize
    replaced = facts.linears if facts.head_is_tied else facts.packed  # a tied head's is the embedding's
    weights = sum(linear.in_features * linear.out_features for linear in replaced)
    parameters = sum(tensor.size_bytes for tensor in facts.tensors if not tensor.buffer)
    return (
        parameters
        - weights * facts.dtype_bytes
        + sum(packed_bytes(linear, config) for linear in facts.packed)
    )


def snapshot_bytes(facts: ModelFacts, work: Work) -> int:
    """Bytes of the hidden states of all samples, in both streams; 0 where they live inside open forwards, of
    which there are no snapshots."""
    if facts.between:
        return 0
    samples = work.calibration.samples
    both = samples + work.paired_samples
    return both * hidden_bytes(facts, work) // samples


def head_work_set(facts: ModelFacts, head: LinearFact, work: Work, micro_batch_tokens: int) -> WorkSet:
    """The bytes that quantizing the head needs: its rows are solved `HEAD_ROWS` at a time."""
    b, k = facts.dtype_bytes, head.in_features
    weights, square = min(head.out_features, HEAD_ROWS) * k, 4 * k**2
    flight = micro_batch_tokens * b * IN_FLIGHT_HIDDEN * facts.hidden_size
    widened = min(CHUNK_BYTES, 4 * micro_batch_tokens * k)
    sums = leaf_sum_bytes(work.ranks, [TRIANGLE * square], work.rank)
    hidden = own_samples(work).all * sample_bytes(facts, work)
    stored = 2 * packed_bytes(head, work.quantize)  # the pieces, and the whole that is made of them
    moments = (
        WorkSet(flight + widened, square + sums.collecting, 0, hidden),
        WorkSet(0, square + sums.exchanging, 0, 0),
        WorkSet(SOLVE_BYTES * weights, 2 * square, stored, 0),
        WorkSet(0, square, stored + PACK_BYTES * weights, 0),
    )
    return max(moments, key=lambda moment: moment.total_bytes)
