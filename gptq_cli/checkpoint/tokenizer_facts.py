"""Whether readers can open the tokenizer of a checkpoint: it is opened by Transformers, as they do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_cli.calibration.chat import template_fault
from gptq_cli.calibration.tokenizer import open_tokenizer
from gptq_cli.devices.out_of_memory import is_out_of_memory
from gptq_cli.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFacts:
    """What came of opening the tokenizer."""

    fault: str = ""
    """Why no reader can open it."""
    hint: str = ""
    unopened: str = ""
    """Why it was not opened here, which says nothing about it."""
    templates: tuple[tuple[str, str], ...] = ()
    """(chat template, why Jinja cannot read it) of those that it cannot."""


def tokenizer_facts(directory: Path, *, trust_remote_code: bool) -> TokenizerFacts:
    """Open the tokenizer in `directory`, and compile its chat templates; no template runs."""
    try:
        tokenizer = open_tokenizer(directory, trust_remote_code)
    except ModelError as error:
        if is_out_of_memory(error):
            raise
        if _needs_more(error):
            return TokenizerFacts(unopened=error.message)
        return TokenizerFacts(fault=error.message, hint=error.hint or "")
    faults = ((name, template_fault(source)) for name, source in _templates(tokenizer))
    return TokenizerFacts(templates=tuple((name, why) for name, why in faults if why))


def _needs_more(error: ModelError) -> bool:
    """Whether it was not opened for want of a package, or of leave to run its code."""
    cause = error.__cause__
    if "trust_remote_code" in str(cause):
        return True
    while cause is not None and not isinstance(cause, ImportError):
        cause = cause.__cause__ or cause.__context__  # Transformers makes a ValueError of a lack of tiktoken
    return cause is not None


def _templates(tokenizer: Any) -> tuple[tuple[str, str], ...]:
    found = getattr(tokenizer, "chat_template", None)
    named = found if isinstance(found, Mapping) else {"chat template": found}
    return tuple((str(name), text) for name, text in named.items() if isinstance(text, str))
