"""Making a model on the meta device: modules and shapes, no memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers.initialization import meta_device_safe_creation_ops

from gptq_cli.config import ModelRef
from gptq_cli.errors import ModelError
from gptq_cli.model.architecture import raise_import_failure
from gptq_cli.model.config_types import COMPARE
from gptq_cli.model.model_class import make_model
from gptq_cli.model.quiet import quiet_libraries
from gptq_cli.wording import first_line, number_of

_MODULES_LIMIT = 50_000
"""Modules of any model, beside 3 for each tensor of its files. The largest models have 100,000 modules, and
as many tensors."""


def build_meta(config: Any, ref: ModelRef, dtype: torch.dtype, *, tensors: int = 0) -> Any:
    """The model of `config` on the meta device, parameters in `dtype`; a quantization config is ignored.

    `tensors`: how many the files hold. A config that asks for many times more modules is refused
    (`ModelError`) before they fill the memory.
    """
    try:
        with quiet_libraries(), torch.device("meta"), meta_device_safe_creation_ops(), _counted(ref, tensors):
            model = make_model(config, dtype, trust_remote_code=ref.trust_remote_code)
    except ModelError:
        raise
    except Exception as error:
        raise_import_failure(error)
        raise ModelError(
            f"the architecture of {ref.model} cannot be built: {first_line(error)}",
            hint="check config.json, and that the packages which the architecture needs are installed",
        ) from error
    _empty(model)
    return model.eval().requires_grad_(False)


def _empty(model: nn.Module) -> None:
    """Put parameters on the meta device that the constructor made elsewhere (from random numbers, from a
    list): a tensor with values would be taken for one that needs none from the files."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                empty = made.setdefault(
                    id(parameter), nn.Parameter(parameter.to("meta"), requires_grad=False)
                )
                module._parameters[name] = empty


@contextmanager
def _counted(ref: ModelRef, tensors: int) -> Iterator[None]:
    """Stop building a model that has far more modules than the files could fill."""
    limit = _MODULES_LIMIT + 3 * tensors
    maker = threading.get_ident()
    count = 0

    def registered(module: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal count
        count += threading.get_ident() == maker
        if count > limit:
            raise ModelError(
                f"config.json of {ref.model} asks for more than {limit} modules; "
                f"the files hold {number_of(tensors, 'tensor')}",
                hint=COMPARE,
            )

    handle = register_module_module_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()
