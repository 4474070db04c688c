"""Rules about the model's files: is everything there, sound, and safe to read.

`model.source` and `model.skeleton` find the facts while they read the heads of the files; each kind is a
rule of its own here, so that it has a stable id and an explanation.
"""

from __future__ import annotations

from gptq_cli.findings import Finding, Level
from gptq_cli.planning.cases import JobCase

_AGAIN = "fetch the model again"


def already_quantized(case: JobCase) -> list[Finding]:
    """The model's config.json names a quantization: its weights are codes already.

    Quantizing codes would read packed integers as weights. Start from the unquantized original.
    """
    method = case.facts.already_quantized
    if method is None:
        return []
    return [
        Finding(
            rule="already-quantized",
            level="error",
            subject=case.facts.model,
            message=f"the model is quantized already (quant_method {method!r}); an unquantized one is needed",
            hint="give the original model; gptq load opens a GPTQ checkpoint",
        )
    ]


def pickled_weights(case: JobCase) -> list[Finding]:
    """The weights are pickles (.bin, .pt). Opening a pickle can run any program, so they are never read."""
    return _of_kind(case, "pickled-weights", "error")


def no_weights(case: JobCase) -> list[Finding]:
    """The directory holds no safetensors weights at all."""
    return _of_kind(case, "no-weights", "error")


def truncated_shard(case: JobCase) -> list[Finding]:
    """A safetensors file is shorter than its own header says, as after a broken download."""
    return _of_kind(case, "truncated-shard", "error")


def corrupt_shard(case: JobCase) -> list[Finding]:
    """A safetensors file contradicts itself: a header that is no JSON, overlapping or doubled tensors."""
    return _of_kind(case, "corrupt-shard", "error")


def missing_shard(case: JobCase) -> list[Finding]:
    """The index names a file that is not there."""
    return _of_kind(case, "missing-shard", "error")


def unreadable_shard(case: JobCase) -> list[Finding]:
    """A file of the weights exists but cannot be opened."""
    return _of_kind(case, "unreadable-shard", "error")


def unlisted_shard(case: JobCase) -> list[Finding]:
    """A file of weights is in the directory, but the index does not name it: its tensors would be missed."""
    return _of_kind(case, "unlisted-shard", "error")


def bad_index(case: JobCase) -> list[Finding]:
    """The index of the shards cannot be read."""
    return _of_kind(case, "bad-index", "error")


def unsafe_path(case: JobCase) -> list[Finding]:
    """The index names a file outside of the model's directory: no honest tool writes that."""
    return _of_kind(case, "unsafe-path", "error")


def special_file(case: JobCase) -> list[Finding]:
    """A named pipe, a socket or a device has the name of a file that would be read. It is never opened."""
    return _of_kind(case, "special-file", "error")


def file_too_large(case: JobCase) -> list[Finding]:
    """A small file beside the weights is larger than any of its kind: reading it would fill the memory."""
    return _of_kind(case, "file-too-large", "error")


def outside_link(case: JobCase) -> list[Finding]:
    """A link leads the config, the tokenizer or the weights out of the model's directory.

    What is read goes into a checkpoint that people publish, so a link is followed within the model's own
    directory only, or, in a hub cache, into the blobs of the same repository.
    """
    return _of_kind(case, "outside-link", "error")


def link_left_out(case: JobCase) -> list[Finding]:
    """A small file beside the model is a link that leads out of its directory: it is not copied.

    A licence or a chat template that is missing can be added by hand; somebody else's file in a published
    checkpoint cannot be taken back.
    """
    return _of_kind(case, "link-left-out", "warning")


def missing_tensor(case: JobCase) -> list[Finding]:
    """The index puts a tensor into a file that does not hold it."""
    return _of_kind(case, "missing-tensor", "error")


def missing_weight(case: JobCase) -> list[Finding]:
    """The model that config.json describes has weights that no file holds; they would be random numbers."""
    return _of_kind(case, "missing-weight", "error")


def shape_mismatch(case: JobCase) -> list[Finding]:
    """A tensor in the files has another shape than the model that config.json describes."""
    return _of_kind(case, "shape-mismatch", "error")


def unsupported_dtype(case: JobCase) -> list[Finding]:
    """A weight is stored in a type that is no plain float."""
    return _of_kind(case, "unsupported-dtype", "error")


def no_tokenizer(case: JobCase) -> list[Finding]:
    """The model's directory holds no tokenizer, so calibration text cannot become tokens."""
    return _of_kind(case, "no-tokenizer", "error")


def unreadable_file(case: JobCase) -> list[Finding]:
    """A small file beside the model, such as its licence, would be copied, but cannot be opened."""
    return _of_kind(case, "unreadable-file", "error")


def tokenizer(subject: str, message: str, hint: str) -> list[Finding]:
    """The tokenizer of the model cannot be opened, so calibration text cannot become tokens.

    Found while the text is cut into windows, which happens before a weight is read.
    """
    return [Finding(rule="tokenizer", level="error", subject=subject, message=message, hint=hint)]


def calibration_text(subject: str, message: str, hint: str) -> list[Finding]:
    """The calibration source cannot be read, or holds too little text for the windows that were asked for.

    Found while the text is cut into windows, which happens before a weight is read.
    """
    return [Finding(rule="calibration-text", level="error", subject=subject, message=message, hint=hint)]


_KINDS = frozenset(
    {
        "pickled-weights",
        "no-weights",
        "truncated-shard",
        "corrupt-shard",
        "missing-shard",
        "unreadable-shard",
        "unlisted-shard",
        "bad-index",
        "unsafe-path",
        "special-file",
        "file-too-large",
        "outside-link",
        "link-left-out",
        "missing-tensor",
        "missing-weight",
        "shape-mismatch",
        "unsupported-dtype",
        "no-tokenizer",
        "unreadable-file",
    }
)


def weights_unsound(case: JobCase) -> list[Finding]:
    """Something else is wrong with the model's files; the message says what."""
    return [
        Finding(
            rule="weights-unsound",
            level="error",
            subject=problem.subject,
            message=problem.message,
            hint=problem.hint or _AGAIN,
        )
        for problem in case.problems
        if problem.kind not in _KINDS
    ]


def _of_kind(case: JobCase, kind: str, level: Level) -> list[Finding]:
    return [
        Finding(rule=kind, level=level, subject=p.subject, message=p.message, hint=p.hint or _AGAIN)
        for p in case.problems
        if p.kind == kind
    ]


RULES = (
    already_quantized,
    pickled_weights,
    no_weights,
    bad_index,
    unsafe_path,
    special_file,
    file_too_large,
    outside_link,
    link_left_out,
    missing_shard,
    truncated_shard,
    corrupt_shard,
    unreadable_shard,
    unlisted_shard,
    missing_tensor,
    missing_weight,
    shape_mismatch,
    unsupported_dtype,
    no_tokenizer,
    unreadable_file,
    weights_unsound,
)
