"""Rules about the model's files: is everything there, sound, and safe to read?

`model.source` and `model.skeleton` find the problems while they read the headers of the files. Each kind of
problem is a rule of its own here, so that it has a stable id and an explanation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from gptq_cli.findings import Level
from gptq_cli.model.source import SourceProblem
from gptq_cli.planning.cases import JobCase
from gptq_cli.rules import Remark, Rule, explanation_of, rule, rule_id, rules_in
from gptq_cli.wording import names_text, number_of

_AGAIN = "fetch the model again"


def _problem(level: Level) -> Callable[[Callable[[], None]], Rule[JobCase]]:
    """Make a rule of a name and a docstring: it reports the problems of the kind that has its name."""

    def made(named: Callable[[], None]) -> Rule[JobCase]:
        kind = rule_id(named)

        def check(case: JobCase) -> list[Remark]:
            return [_remark(problem) for problem in case.problems if problem.kind == kind]

        return Rule(id=kind, levels=(level,), topics=(), explanation=explanation_of(named), check=check)

    return made


def _remark(problem: SourceProblem) -> Remark:
    return Remark(subject=problem.subject, message=problem.message, hint=problem.hint or _AGAIN)


def unsound(case: JobCase) -> bool:
    """Whether a rule about the files refuses the model, whatever is asked of it."""
    return any(one.level == "error" for found in rules_in(sys.modules[__name__]) for one in found(case))


@rule("error")
def already_quantized(case: JobCase) -> list[Remark]:
    """The model's weights are codes already: config.json names a quantization that is not decoded, or the
    files hold packed integers.

    Quantizing codes would read packed integers as weights. Start from the unquantized original, or from a
    release in FP8, MXFP4 or NVFP4: those are decoded while they are read.
    """
    method = case.facts.already_quantized
    if method is None:
        return []
    return [
        Remark(
            subject=case.facts.model,
            message=f"the model is quantized already ({method}); an unquantized one is needed",
            hint="give the original model, or its release in FP8, MXFP4 or NVFP4, which is decoded; "
            "gptq load opens a GPTQ checkpoint",
        )
    ]


@rule("note")
def decoded_source(case: JobCase) -> list[Remark]:
    """The weights are stored in few bits (FP8, MXFP4, NVFP4) and are decoded while they are read.

    Each tensor becomes bfloat16 when its turn comes; the checkpoint is that of a quantized dense model, and
    what stays dense is written in bfloat16. Scales of activations and of key-value caches are for readers of
    the source's own format, and are left out.
    """
    decoded = case.facts.decoded
    if decoded is None:
        return []
    left_out = "without a place in a dense model is", "without a place in a dense model are"
    dropped = (
        f"; {number_of(len(decoded.dropped), 'scale', *left_out)} left out ({names_text(decoded.dropped, 2)})"
        if decoded.dropped
        else ""
    )
    return [
        Remark(
            subject=case.facts.model,
            message=f"the source is {decoded.words}: {number_of(decoded.tensors, 'tensor')}{dropped}",
            hint="the rounding of those bits stays in the result; where there is a bfloat16 release, it is "
            "the better source",
        )
    ]


@_problem("error")
def pickled_weights() -> None:
    """The weights are pickles (.bin, .pt). Opening a pickle can run any program, so they are never read."""


@_problem("error")
def no_weights() -> None:
    """The directory holds no safetensors weights."""


@_problem("error")
def bad_index() -> None:
    """The index of the shards cannot be read."""


@_problem("error")
def unsafe_path() -> None:
    """The index names a file outside the model's directory, which no tool should write."""


@_problem("error")
def special_file() -> None:
    """A named pipe, a socket or a device has the name of a file that would be read. It is never opened."""


@_problem("error")
def file_not_fetched() -> None:
    """A pointer of Git LFS, or a link to nothing, stands in the place of a file of the model.

    A template or settings count, too: a pointer in their place would be read as one. A clone without
    `git lfs` leaves pointers, and a folder that was copied out of a hub cache leaves links.
    """


@_problem("error")
def file_too_large() -> None:
    """A small file beside the weights is larger than any of its kind: reading it could exhaust the memory."""


@_problem("error")
def outside_link() -> None:
    """A link leads the config, the tokenizer or the weights out of the model's directory.

    What is read goes into a checkpoint that people publish, so a link is followed within the model's own
    directory only, or, in a hub cache, into the blobs of the same repository.
    """


@_problem("warning")
def link_left_out() -> None:
    """A small file beside the model is a link out of its directory, or to nothing: it is not copied.

    A licence or a chat template that is missing can be added by hand; somebody else's file in a published
    checkpoint cannot be taken back.
    """


@_problem("warning")
def pointer_left_out() -> None:
    """A pointer of Git LFS stands in the place of a file that only people read: it is not copied.

    Such a pointer in the place of a file that programs read is an error (`file-not-fetched`).
    """


@_problem("error")
def missing_shard() -> None:
    """The index names a file that is not there."""


@_problem("error")
def truncated_shard() -> None:
    """A safetensors file is shorter than its own header says, as after a broken download."""


@_problem("error")
def corrupt_shard() -> None:
    """A safetensors file contradicts itself: a header that is not JSON, overlapping or duplicate tensors."""


@_problem("error")
def unreadable_shard() -> None:
    """A file of the weights exists but cannot be opened."""


@_problem("error")
def unlisted_shard() -> None:
    """A file of weights is in the directory, but the index does not name it: its tensors would be missed."""


@_problem("error")
def missing_tensor() -> None:
    """The index puts a tensor into a file that does not hold it."""


@_problem("warning")
def unlisted_tensor() -> None:
    """A file of weights holds a tensor that the index leaves out: readers that go by the index lose it.

    All tensors of the files are read here, and a checkpoint that is written has an index of all of them.
    """


@_problem("error")
def missing_weight() -> None:
    """The model that config.json describes has weights that no file holds; they would be random numbers."""


@_problem("error")
def shape_mismatch() -> None:
    """A tensor in the files has another shape than the model that config.json describes."""


@_problem("error")
def unsupported_dtype() -> None:
    """A weight is stored in few bits, and no quantization_config in config.json says how it is decoded."""


@_problem("warning")
def left_over_config() -> None:
    """config.json describes a quantization, and every tensor of the files is dense.

    A model that was merged or dequantized often keeps the config of what it was. Its weights are taken as
    they are, and the checkpoint gets a quantization_config of its own.
    """


@_problem("error")
def missing_scale() -> None:
    """A weight in few bits has no scale beside it: its codes alone are not its values."""


@_problem("error")
def scale_mismatch() -> None:
    """The scales of a weight in few bits have another number or dtype than its format and config ask for."""


@_problem("error")
def unknown_scaling() -> None:
    """A tensor beside a weight in few bits changes what its codes stand for, in a way that is not decoded."""


@_problem("error")
def no_tokenizer() -> None:
    """The model's directory holds no tokenizer, so calibration text cannot become tokens."""


@_problem("error")
def unreadable_file() -> None:
    """A small file beside the model, such as its licence, would be copied, but cannot be opened."""


@_problem("error")
def broken_settings() -> None:
    """A file of settings beside the weights, such as generation_config.json, is not a JSON object: readers
    stop at it, or go without what it says.
    """


@rule("error")
def weights_unsound(case: JobCase) -> list[Remark]:
    """Something else is wrong with the model's files; the message says what."""
    kinds = {one.id for one in rules_in(sys.modules[__name__])}
    return [_remark(problem) for problem in case.problems if problem.kind not in kinds]
