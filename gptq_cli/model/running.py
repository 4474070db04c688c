"""Running a whole model, wherever its parts lie: the device that takes tokens, and how it runs fastest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gptq_cli.devices.accelerators import working_on
from gptq_cli.devices.fp32_matmul import matmul_scope


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
