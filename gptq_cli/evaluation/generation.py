"""From a prompt to text: Transformers' `generate`, with the text reported piece by piece."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from gptq_cli.devices.accelerators import present_accelerators, torch_device
from gptq_cli.errors import NonFinite
from gptq_cli.evaluation.generation_config import for_generate, settings_of, stop_criterion
from gptq_cli.evaluation.prompt import encode_prompt
from gptq_cli.load_job import GREEDY, Sampling
from gptq_cli.model.quiet import quiet_log
from gptq_cli.model.running import input_device, matmul_scope_of

OnToken = Callable[[str, int], None]
"""Called with (the next piece of text, tokens generated so far)."""
CLEAN_UP_REACH = 8
"""Characters at the end of a text that the clean-up of spaces may still change; its longest pattern has 4."""
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The generated text. `first_token_seconds` covers the prompt, `seconds` everything."""

    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    first_token_seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed: tokens after the first over the time after the first; None for a single token."""
        after = self.seconds - self.first_token_seconds
        return (self.new_tokens - 1) / after if self.new_tokens > 1 and after > 0 else None


@contextmanager
def _own_predictions_finite(model: Any) -> Iterator[None]:
    """Look at predictions as the model makes them: the setting `remove_invalid_values` hides a NaN."""

    def look(module: Any, args: Any, output: Any) -> None:
        _finite(output.logits, output.logits[:, -1])

    handle = model.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _finite(input_ids: Tensor, scores: Tensor) -> Tensor:
    """`scores`, as a processor of Transformers; raises `NonFinite` where they hold a NaN or infinity.

    The largest would be token 0 for ever, and a text of nothing would count as one. Minus infinity is how
    settings ban a token.
    """
    if bool((scores.isnan() | scores.isposinf()).any()):
        raise NonFinite(
            "the model's prediction of the next token is not finite",
            hint="float16 may overflow: try --dtype bfloat16; --verify finds damaged weights",
        )
    return scores


class TextPieces:
    """A Transformers streamer (`put`, `end`) that turns token ids into pieces of text as early as is safe.

    The text is the decoding of all tokens at once, and a later token may change how earlier ones decode: a
    token may end in the middle of a character; a run of byte tokens (`<0xE9>`, of tokenizers that fall back
    to bytes) decodes only as a whole; clean-up removes a space before certain characters. Text that may still
    change is held back, and so is text on which two successive decodings disagree. Transformers' own
    `TextStreamer` prints such text early and loses part of it. Should a decoder change text that was already
    reported, nothing more is reported until the end, and then everything from the first difference on: no
    text is lost.
    """

    def __init__(self, tokenizer: Any, on_token: OnToken) -> None:
        self._tokenizer, self._on_token = tokenizer, on_token
        self._ids: list[int] = []
        self._skipped = _special_ids(tokenizer)
        self._held = CLEAN_UP_REACH if getattr(tokenizer, "clean_up_tokenization_spaces", False) else 0
        self._in_bytes = False
        self._decoded = ""
        self._shown = ""
        self._is_prompt = True
        self.tokens = 0
        self.first_at: float | None = None

    def put(self, value: Tensor) -> None:
        """Called by `generate` with the prompt first, then with every new token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        if self.first_at is None:
            self.first_at = time.perf_counter()
        ids = value.flatten().tolist()
        self.tokens += len(ids)
        self._ids += ids
        for token in ids:
            self._in_bytes = self._is_byte(token)
        before, self._decoded = self._decoded, self.text
        if self._in_bytes or self._decoded == before:
            return
        agreed = _common(before, self._decoded)
        settled = agreed[: max(0, len(self._decoded) - self._held)].rstrip("\ufffd")
        if settled.startswith(self._shown):
            self._show(settled[len(self._shown) :])

    def end(self) -> None:
        """Called by `generate` once: reports the text that was held back."""
        text = self.text
        self._show(text[len(_common(self._shown, text)) :])

    @property
    def text(self) -> str:
        """The text of all tokens so far."""
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _is_byte(self, token: int) -> bool:
        """Whether a run of byte tokens is open after `token`; a token that decodes to nothing does not end
        it."""
        piece = None if token in self._skipped else self._tokenizer.convert_ids_to_tokens(token)
        return self._in_bytes if piece is None else _BYTE_TOKEN.fullmatch(piece) is not None

    def _show(self, piece: str) -> None:
        if piece:
            self._shown += piece
            self._on_token(piece, self.tokens)


def _common(one: str, other: str) -> str:
    """The longest common prefix."""
    if other.startswith(one):
        return one
    pairs = zip(one, other, strict=False)
    return one[: next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))]


def _special_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that decoding skips."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {number for number, token in added.items() if getattr(token, "special", False)}
    return frozenset(special | set(getattr(tokenizer, "all_special_ids", ())))


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 64,
    on_token: OnToken = lambda text, tokens: None,
    *,
    raw: bool = False,
    sampling: Sampling = GREEDY,
) -> Generation:
    """Continue `prompt` by at most `max_new_tokens` tokens; `on_token` gets the text piece by piece.

    The model's generation config is followed as described in `gptq_cli.evaluation.generation_config`. A beam
    search reports its text at the end, as one piece. Raises `ConfigError` for a prompt that makes no tokens,
    `CheckpointError` for an invalid setting, `NonFinite` where predictions are not finite.
    """
    ids = encode_prompt(tokenizer, prompt, raw=raw).to(input_device(model))
    settings = settings_of(model.generation_config, model.get_input_embeddings().num_embeddings)
    pieces = TextPieces(tokenizer, on_token)
    stop = stop_criterion(settings, tokenizer)
    length = ids.shape[1]
    options = for_generate(
        settings, sampled=sampling.temperature > 0, prompt_tokens=length, max_new_tokens=max_new_tokens
    )
    options |= {
        "do_sample": False,
        "max_new_tokens": max_new_tokens,
        "use_cache": True,
        "pad_token_id": _pad_token(tokenizer, model),
    }
    if sampling.temperature > 0:
        options |= {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
    with torch.inference_mode(), matmul_scope_of(model), _seeded(sampling), _guided(model, options):
        started = time.perf_counter()
        with _nothing_to_draw_explained(), _own_predictions_finite(model), quiet_log():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=model.generation_config,
                streamer=pieces if settings.beams == 1 else None,
                logits_processor=LogitsProcessorList([_finite]),
                stopping_criteria=StoppingCriteriaList([stop] if stop is not None else []),
            )
        seconds = time.perf_counter() - started
    first_at = pieces.first_at
    if settings.beams > 1:
        pieces.put(ids)
        pieces.put(out[0, length:])
        pieces.end()
    return Generation(
        prompt=prompt,
        text=pieces.text,
        prompt_tokens=length,
        new_tokens=pieces.tokens,
        seconds=seconds,
        first_token_seconds=(first_at or started) - started,
    )


@contextmanager
def _guided(model: Any, options: Mapping[str, Any]) -> Iterator[None]:
    """Replace the model's generation config: `generate` takes from it whatever a passed config leaves out."""
    own = model.generation_config
    with quiet_log():
        model.generation_config = GenerationConfig(**options)
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _nothing_to_draw_explained() -> Iterator[None]:
    """Explain torch's refusal to draw from probabilities that are not finite."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise NonFinite(
            "the probabilities of the next token are not finite, so none can be drawn",
            hint="a temperature very close to 0 overflows, and so do damaged weights: try --temperature 0",
        ) from error


def _pad_token(tokenizer: Any, model: Any) -> int | None:
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id, model.generation_config.eos_token_id):
        if isinstance(value, list):
            value = value[0] if value else None
        if value is not None and value >= 0:
            return int(value)
    return None


@contextmanager
def _seeded(sampling: Sampling) -> Iterator[None]:
    """Seed the generators that sampling draws from, and restore them. Greedy decoding draws nothing.

    `torch.manual_seed` seeds the generators of every device, so those of every device are saved.
    """
    if sampling.temperature == 0:
        yield
        return
    devices = [torch_device(device) for device in present_accelerators()]
    with torch.random.fork_rng(devices=devices, device_type=devices[0].type if devices else "cuda"):
        torch.manual_seed(sampling.seed)
        yield
