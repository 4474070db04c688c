"""Running a whole model, wherever its parts lie: the device that takes tokens, how it runs fastest, and its
cache."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from gptq_cli.devices.accelerators import working_on
from gptq_cli.devices.fp32_matmul import matmul_scope

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What forwards and their outputs call what they keep of earlier tokens: in Transformers from 5.24 on, before
it, and in its state-space models before it."""


def cache_name(model: Any) -> str | None:
    """What the forward of `model` calls its cache; None where it takes none."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def input_device(model: Any) -> torch.device:
    """The device for token ids: that of the embedding, or the one its hook runs it on."""
    embedding = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if device is not None else embedding.weight.device


@contextmanager
def matmul_scope_of(model: Any) -> Iterator[None]:
    """The scope in which `model` runs fastest; its device is the current one inside."""
    device = input_device(model)
    with working_on(device), matmul_scope(model.get_input_embeddings().weight.dtype, device):
        yield


def locate_by_values(model: Any) -> None:
    """Make `model.device`, and that of models inside it, the device of its first parameter that has values.

    Transformers takes the first parameter of all, which in a model whose tower stays in the files is on meta
    for good, and the forward of Idefics 3 puts the embedded tokens there.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            kind = type(module)
            own = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
            module.__class__ = type(kind.__name__, (kind,), own | {"device": property(_device_of_values)})


def _device_of_values(model: PreTrainedModel) -> torch.device:
    devices: list[torch.device] = [parameter.device for parameter in model.parameters()]
    return next((device for device in devices if device.type != "meta"), devices[0])
