"""A prompt becomes text: Transformers' `generate`, with the pieces handed out as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptq_cli.config import GREEDY, Sampling
from gptq_cli.devices.accelerators import present_accelerators, torch_device, working_on
from gptq_cli.devices.products import products_for
from gptq_cli.errors import ConfigError

OnToken = Callable[[str, int], None]
"""Called with (the next piece of text, tokens generated so far)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What came out. `first_token_seconds` covers the prompt, `seconds` everything."""

    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    first_token_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed: tokens after the first over the time after the first; 0 for a single token."""
        after = self.seconds - self.first_token_seconds
        return (self.new_tokens - 1) / after if self.new_tokens > 1 and after > 0 else 0.0


class TextPieces:
    """A Transformers streamer (`put`, `end`) that turns token ids into pieces of text as early as is safe.

    A token may end in the middle of a character; a piece is held back until the text so far decodes without
    the replacement character at its end.
    """

    def __init__(self, tokenizer: Any, on_token: OnToken) -> None:
        self._tokenizer, self._on_token = tokenizer, on_token
        self._ids: list[int] = []
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
        self._show(self._decoded(), final=False)

    def end(self) -> None:
        """Called by `generate` once: hands out what was held back."""
        self._show(self._decoded(), final=True)

    @property
    def text(self) -> str:
        """Everything handed out so far."""
        return self._shown

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _show(self, text: str, *, final: bool) -> None:
        if not final and text.endswith("\ufffd"):
            return
        if text.startswith(self._shown) and len(text) > len(self._shown):
            piece = text[len(self._shown) :]
            self._shown = text
            self._on_token(piece, self.tokens)


def encode_prompt(tokenizer: Any, prompt: str, *, raw: bool = False) -> Tensor:
    """Token ids (1, T): through the chat template where the tokenizer has one, unless `raw`."""
    if not raw and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    ids = encoded["input_ids"]
    assert isinstance(ids, Tensor)
    if ids.shape[1] == 0:
        raise ConfigError("the prompt holds no tokens", hint="give --prompt some text")
    return ids


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
    """Continue `prompt` by at most `max_new_tokens` tokens; `on_token` gets the text piece by piece."""
    ids = encode_prompt(tokenizer, prompt, raw=raw).to(input_device(model))
    pieces = TextPieces(tokenizer, on_token)
    options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature > 0:
        options = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
    with torch.inference_mode(), products_of(model), _seeded(sampling):
        started = time.perf_counter()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            use_cache=True,
            pad_token_id=_pad_token(tokenizer, model),
            streamer=pieces,
            **options,
        )
        seconds = time.perf_counter() - started
    return Generation(
        prompt=prompt,
        text=pieces.text,
        prompt_tokens=ids.shape[1],
        new_tokens=pieces.tokens,
        seconds=seconds,
        first_token_seconds=(pieces.first_at or started) - started,
    )


def input_device(model: Any) -> torch.device:
    """Where token ids go: the device of the embedding, or the one its hook executes on."""
    embedding = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if device is not None else embedding.weight.device


@contextmanager
def products_of(model: Any) -> Iterator[None]:
    """The scope in which `model` runs fastest where it stands, its device being the current one."""
    device = input_device(model)
    with working_on(device), products_for(model.get_input_embeddings().weight.dtype, device):
        yield


def _pad_token(tokenizer: Any, model: Any) -> int | None:
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id, model.generation_config.eos_token_id):
        if isinstance(value, list):
            value = value[0] if value else None
        if value is not None:
            return int(value)
    return None


@contextmanager
def _seeded(sampling: Sampling) -> Iterator[None]:
    """Seed the generators that sampling draws from, and put them back. Greedy decoding draws nothing.

    `torch.manual_seed` seeds those of every device, so those of every device are kept.
    """
    if sampling.temperature == 0:
        yield
        return
    devices = [torch_device(device) for device in present_accelerators()]
    with torch.random.fork_rng(devices=devices, device_type=devices[0].type if devices else "cuda"):
        torch.manual_seed(sampling.seed)
        yield
