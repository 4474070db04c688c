"""Whether the texts of `gptq load` fit the model, checked before a weight is read.

Past its positions a model either fails in the middle of the work, which is refused here, or continues with
worse results, which is a warning: see `gptq_cli.model.positions`.
"""

from __future__ import annotations

from typing import Any

from gptq_cli.calibration import TokenBatches
from gptq_cli.calibration.documents import PIECE_CHARACTERS
from gptq_cli.checkpoint.checkpoint import QuantizedCheckpoint
from gptq_cli.errors import ConfigError, ModelError
from gptq_cli.evaluation.generation_config import FILE, read_generation_config, settings_of, stop_criterion
from gptq_cli.evaluation.prompt import encode_prompt
from gptq_cli.events import Warned
from gptq_cli.findings import Finding
from gptq_cli.load_job import LoadJob
from gptq_cli.model.positions import Positions
from gptq_cli.model.text_part import language_model
from gptq_cli.preflight.rules.calibration import WindowsCase, no_chat_template, table_as_text
from gptq_cli.wording import number_of


def check_prompt(
    job: LoadJob,
    prompt: str,
    checkpoint: QuantizedCheckpoint,
    tokenizer: Any,
    positions: Positions | None,
) -> list[Warned]:
    """Warnings about --prompt, and about settings of the model that will not be followed.

    Raises `ConfigError` for a prompt that makes no tokens, that the chat template refuses or that does not
    fit, `CheckpointError` for a generation config that cannot be followed, `ModelError` for a tokenizer of
    another model.
    """
    model = checkpoint.model
    vocabulary = language_model(model).get_input_embeddings().num_embeddings
    source = FILE if (checkpoint.directory / FILE).is_file() else "config.json"
    settings = settings_of(read_generation_config(checkpoint.directory, model), vocabulary, source)
    stop_criterion(settings, tokenizer)
    ids = encode_prompt(tokenizer, prompt, raw=job.raw)
    if int(ids.max()) >= vocabulary:
        raise ModelError(
            f"the tokenizer makes token {int(ids.max())} of the prompt, but the model's embedding has "
            f"{vocabulary} rows",
            hint="the tokenizer belongs to another model; copy the model's own tokenizer files beside it",
        )
    found = [Warned(settings.note)] if settings.note else []
    if settings.beams > 1:
        found.append(
            Warned(f"{source} sets num_beams = {settings.beams}: the text appears as one piece, at the end")
        )
    return found + _check_length(ids.shape[1], job.max_new_tokens, positions)


def _check_length(prompt: int, new: int, positions: Positions | None) -> list[Warned]:
    last = prompt + new - 1  # the last new token is not processed
    if positions is None or last <= positions.tokens:
        return []
    limit = positions.tokens
    if not positions.fixed:
        return [
            Warned(
                f"the prompt of {number_of(prompt, 'token')} and up to {new:,} new ones go past the "
                f"{limit:,} positions that the model was made for",
                "text past them tends to be poor; shorten the prompt, or lower --max-new-tokens",
            )
        ]
    if prompt > limit:
        raise ConfigError(
            f"the prompt has {number_of(prompt, 'token')}, but the model has {number_of(limit, 'position')}",
            hint=f"shorten the prompt to at most {number_of(limit, 'token')}",
        )
    raise ConfigError(
        f"the prompt of {number_of(prompt, 'token')} and max_new_tokens {new} need "
        f"{number_of(last, 'position')}, but the model has {limit:,}",
        hint=f"use --max-new-tokens {limit - prompt + 1}, or a shorter prompt",
    )


def check_windows(seq_len: int, positions: Positions | None) -> list[Warned]:
    """Warnings about windows of `seq_len` tokens. Raises `ConfigError` where they do not fit."""
    if positions is None or seq_len <= positions.tokens:
        return []
    if positions.fixed:
        raise ConfigError(
            f"seq_len is {seq_len}; allowed: at most the {positions.tokens} positions of the model",
            hint=f"use --seq-len {positions.tokens}",
        )
    return [
        Warned(
            f"windows of {seq_len} tokens go past the {positions.tokens} positions that the model "
            "was made for",
            f"the perplexity is not the model's; use --seq-len {positions.tokens}",
        )
    ]


def check_answers(windows: TokenBatches) -> list[Warned]:
    """Warnings where conversations are not measured (no answer of theirs is within a window, or they are
    longer than what is tokenized at once), or not as the model is used."""
    reasons = (
        (
            windows.left_out,
            f"no answer within {windows.seq_len} tokens",
            "longer windows measure more of them: --seq-len of gptq load",
        ),
        (
            windows.too_long,
            f"more than {PIECE_CHARACTERS:,} characters",
            "shorter conversations are measured: cut what is longer",
        ),
    )
    whose = f"of {windows.source}"
    found = [
        Warned(f"{number_of(count, 'conversation', f'{whose} is', f'{whose} are')} left out: {why}", hint)
        for count, why, hint in reasons
        if count
    ]
    return found + [Warned(f"{one.subject}: {one.message}", one.hint) for one in about_windows(windows)]


def about_windows(windows: TokenBatches) -> list[Finding]:
    """What a person should know about how the windows of one source were read."""
    case = WindowsCase(source=windows.source, joined=windows.joined, table=windows.table)
    return [*no_chat_template(case), *table_as_text(case)]
