"""A model writes text itself: to be calibrated on (`--calibration self`), or to be measured on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from gptq_cli.calibration import open_tokenizer
from gptq_cli.calibration.own_text import OwnText, TextStore, Wanted
from gptq_cli.calibration.prompts import read_prompts
from gptq_cli.calibration.text_form import text_form
from gptq_cli.calibration.writing import cache_to_write_with
from gptq_cli.checkpoint.fingerprint import model_digest
from gptq_cli.config import CalibrationConfig
from gptq_cli.devices.accelerators import flush
from gptq_cli.errors import Interrupted
from gptq_cli.events import Observer, PhaseAdvanced, Warned, phase
from gptq_cli.load_job import LoadJob
from gptq_cli.model.skeleton import Skeleton
from gptq_cli.model.text_part import language_model
from gptq_cli.model.weights import load_resident
from gptq_cli.placement.placement import Placement
from gptq_cli.wording import number_of


def text_store(observer: Observer) -> TextStore:
    """A store whose notes are warnings."""
    return TextStore(lambda message, hint: observer(Warned(message, hint)))


def calibration_wanted(skeleton: Skeleton, data: CalibrationConfig) -> Wanted:
    """The text that the model of `skeleton` writes to be calibrated on."""
    return Wanted(
        model=model_digest(skeleton),
        samples=data.own_windows,
        seq_len=data.seq_len,
        seed=data.seed,
        held_out=False,
    )


def evaluation_wanted(skeleton: Skeleton, job: LoadJob) -> Wanted:
    """The text that the dense model of `skeleton` writes to be measured on: other requests, another draw."""
    return Wanted(
        model=model_digest(skeleton), samples=job.windows, seq_len=job.seq_len, seed=0, held_out=True
    )


def check_can_write(skeleton: Skeleton, tokenizer: Any, *, held_out: bool) -> None:
    """Raise `CalibrationError` where the class of the model or its template cannot be used; no weight is
    needed."""
    model = language_model(skeleton.model)
    cache_to_write_with(model)
    text_form(tokenizer, model, read_prompts(held_out=held_out), seed=0)


def write_first(
    wanted: Wanted,
    skeleton: Skeleton,
    placement: Placement,
    store: TextStore,
    observer: Observer,
    command: str,
) -> OwnText:
    """Load the model of `skeleton`, let it write, and free it. Raises `Interrupted` where text was kept."""
    tokenizer = open_tokenizer(skeleton.files.directory, skeleton.ref.trust_remote_code)
    with phase(observer, "load"):
        model = load_resident(skeleton, placement)
    try:
        return write(wanted, language_model(model), tokenizer, store, observer)
    except KeyboardInterrupt as error:
        rows = store.written_rows(wanted)
        if not rows:
            raise
        raise Interrupted(
            f"interrupted while the model wrote its calibration text; {rows * wanted.row_tokens:,} of "
            f"{number_of(wanted.tokens, 'token')} are kept",
            hint=f"to go on: {command}",
        ) from error
    finally:
        del model
        flush(())


def write(wanted: Wanted, model: Any, tokenizer: Any, store: TextStore, observer: Observer) -> OwnText:
    """Let `model` write what is not written yet."""
    with phase(observer, "write", wanted.tokens) as words:
        first = store.written_rows(wanted) * wanted.row_tokens
        found = store.write(wanted, model, tokenizer, _advanced(observer, first))
        words.append(f"{number_of(wanted.tokens - first, 'token')}{f', {first:,} kept' if first else ''}")
    return found


def _advanced(observer: Observer, first: int) -> Callable[[int, int], None]:
    started = time.perf_counter()

    def advanced(done: int, total: int) -> None:
        left = (time.perf_counter() - started) / (done - first) * (total - done) if done < total else None
        observer(PhaseAdvanced("write", done, total, left))

    return advanced
