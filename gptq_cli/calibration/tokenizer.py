"""The tokenizer of a model directory, opened and tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gptq_cli.calibration.processor import processor_template
from gptq_cli.errors import ModelError
from gptq_cli.model.source_files import has_tokenizer
from gptq_cli.wording import first_line


def open_tokenizer(directory: Path | str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a local model directory. Raises `ModelError` where it is missing or does not work."""
    from transformers import AutoTokenizer

    folder = Path(directory)
    hint = "copy the tokenizer files of the original model (tokenizer.json, tokenizer_config.json) beside it"
    if not has_tokenizer(folder):
        raise ModelError(f"{folder} has no tokenizer (no tokenizer.json or tokenizer.model)", hint=hint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True
        )
        words = tokenizer("one two three", verbose=False)["input_ids"]
        empty = not words or _has_no_vocabulary(tokenizer, words)
    except Exception as error:  # the loaders raise anything: OSError, KeyError, json and Rust errors
        reason = first_line(error)
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"the tokenizer of {folder} is code of the model repository",
                hint="read the code, then add --trust-remote-code",
            ) from error
        raise ModelError(f"the tokenizer of {folder} cannot be opened: {reason}", hint=hint) from error
    if empty:
        raise ModelError(f"the tokenizer of {folder} is empty: it makes no tokens from a text", hint=hint)
    if not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = processor_template(folder)
    return tokenizer


def _has_no_vocabulary(tokenizer: Any, words: list[int]) -> bool:
    """Whether the `words` that it made are all special, and it knows no others: some classes make such a
    tokenizer where their files are missing."""
    if set(words) - set(getattr(tokenizer, "all_special_ids", words[:0])):
        return False
    return not set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)
