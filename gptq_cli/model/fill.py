"""Filling a skeleton: giving tensors on the meta device their values, tensor by tensor.

`gptq load` fills all that is not packed (`fill_dense`); quantizing fills what lies outside the blocks, and
then block after block (block_stream.py). A value is read, brought into the model's form and dtype, and put in
place, so that beside the model there is never more than what one tensor is made of. Experts that the files
hold one by one are written into their places in the merged parameter one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gptq_cli.errors import CheckpointError
from gptq_cli.model.conversion import Conversion, KeyMap, Origin, tied_groups
from gptq_cli.model.quiet import no_random_traces, quiet_libraries
from gptq_cli.wording import and_others

OnUntied = Callable[[tuple[str, str]], None]
"""Called with two names that the config ties, though the files hold different tensors for them."""
Read = Callable[[str, torch.device], Tensor]
"""(name in the files, device) -> the tensor, there."""
DeviceOf = Callable[[str], torch.device]
"""Name in the model -> where it belongs."""


def fill_dense(
    model: Any,
    conversion: Conversion,
    origins: Mapping[str, Origin] | KeyMap,
    read: Read,
    device_of: DeviceOf,
    dtype: torch.dtype,
    *,
    on_untied: OnUntied = lambda names: None,
) -> None:
    """Give every tensor of a skeleton its value, except those that already have theirs (under packed
    linears).

    `read(source name, device)` returns a tensor of the files. Ties are kept, also where the files hold equal
    copies; copies that differ stay two tensors, as in Transformers, and `on_untied` is called with their
    names. Buffers that no file stores (rotary frequencies) are computed again. Afterwards no tensor is on the
    meta device. Raises `CheckpointError` naming the first tensor without a value.
    """
    filler = Filler(model, conversion, origins, dtype)
    filler.fill(filler.names, read, device_of, on_untied)
    compute_buffers(model, device_of)
    check_filled(model, filler.names)


def check_filled(model: nn.Module, names: Collection[str]) -> None:
    """Raise `CheckpointError` naming the first of the tensors `names` that is on the meta device."""
    left = [name for name in names if get_tensor(model, name).is_meta]
    if left:
        raise CheckpointError(f"tensor {left[0]}{and_others(left)} is missing")


class Filler:
    """Fills a model from its files, some tensors at a time."""

    def __init__(
        self,
        model: Any,
        conversion: Conversion,
        origins: Mapping[str, Origin] | KeyMap,
        dtype: torch.dtype,
    ) -> None:
        self._model, self._conversion = model, conversion
        self._origins = origins.origins if isinstance(origins, KeyMap) else origins
        self._fixed = _fixed_dtypes(model, dtype)
        self._ties = tied_groups(model)
        self._same = {name: names for names in self._ties for name in names}
        self.names = tuple(dict.fromkeys(name for name, _ in all_tensors(model)))
        """Every parameter and buffer, tied ones under all their names."""
        self._known = frozenset(self.names)

    def sources(self, names: Iterable[str]) -> list[str]:
        """The tensors of the files that the values of `names` are made of, in the order of `fill`."""
        found: dict[str, None] = {}
        for name in names:
            origin = self._origin(name, ())
            if origin is not None and get_tensor(self._model, name).is_meta:
                found |= dict.fromkeys(origin.sources)
        return list(found)

    def fill(
        self,
        names: Iterable[str],
        read: Read,
        device_of: DeviceOf,
        on_untied: OnUntied = lambda names: None,
    ) -> set[str]:
        """Give the tensors `names` on the meta device the values that the files store, and those that are
        tied to them. Returns all names that got a value. Raises `CheckpointError`."""
        done: set[str] = set()
        for target in names:
            origin = self._origin(target, done)
            if target in done or origin is None or not get_tensor(self._model, target).is_meta:
                continue
            for name, value in self._values(origin, read, device_of(target)):
                if name in self._known and get_tensor(self._model, name).is_meta:
                    put_tensor(self._model, name, self._checked(name, value).to(device_of(name)))
                    done.add(name)
            done.add(target)
        return done | self._tie(done, on_untied)

    def _origin(self, target: str, done: Collection[str]) -> Origin | None:
        """Where a tensor comes from; it may be stored under the name of one that it is tied to."""
        origin = self._origins.get(target)
        same = self._same.get(target, ())
        if origin is None and not any(name in done for name in same):
            origin = next((self._origins[name] for name in same if name in self._origins), None)
        return origin

    def _values(self, origin: Origin, read: Read, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """What the model's tensors of `origin` are."""
        parts = self._conversion.parts(origin)
        if parts is None:
            sources = {name: read(name, device) for name in origin.sources}
            yield from self._conversion.convert(origin, sources).items()
            return
        place = get_tensor(self._model, origin.target)
        merged = torch.empty(place.shape, dtype=self._dtype(origin.target, place), device=device)
        for source, part in parts.items():
            value = read(source, device)
            if value.shape != merged[part].shape:
                raise CheckpointError(
                    f"tensor {source} has shape {list(value.shape)}; the config asks for "
                    f"{list(merged[part].shape)}"
                )
            merged[part] = value
            del value
        yield origin.target, merged

    def _checked(self, name: str, value: Tensor) -> Tensor:
        """In the model's dtype. Raises `CheckpointError` for another shape than the model's."""
        place = get_tensor(self._model, name)
        if value.shape != place.shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(value.shape)}; the config asks for {list(place.shape)}"
            )
        return value.to(self._dtype(name, place)) if value.is_floating_point() else value

    def _dtype(self, name: str, place: Tensor) -> torch.dtype:
        return next((dtype for pattern, dtype in self._fixed if pattern.search(name)), place.dtype)

    def _tie(self, done: Collection[str], on_untied: OnUntied) -> set[str]:
        """Have names that the config ties be one tensor, as far as the files agree."""
        found: set[str] = set()
        for names in self._ties:
            if not any(name in done for name in names):
                continue
            real = next((n for n in names if not get_tensor(self._model, n).is_meta), None)
            if real is None:
                continue
            one = get_tensor(self._model, real)
            for name in names:
                other = get_tensor(self._model, name)
                if other.is_meta:
                    found.add(name)
                elif other is not one and not torch.equal(other, one.to(other.device)):
                    on_untied((real, name))
                    continue
                put_tensor(self._model, name, one)
        return found


def empty_out(model: nn.Module, names: Iterable[str]) -> None:
    """Put tensors back on the meta device: their memory is freed unless something else refers to them. Names
    of one tensor stay names of one."""
    filled = [(name, get_tensor(model, name)) for name in names]
    empty: dict[int, Tensor] = {}
    for name, tensor in filled:
        if id(tensor) not in empty:
            meta = torch.empty_like(tensor, device="meta")
            empty[id(tensor)] = nn.Parameter(meta, False) if isinstance(tensor, nn.Parameter) else meta
        put_tensor(model, name, empty[id(tensor)])


def all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers, tied ones under all their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def get_tensor(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer `name`."""
    owner, _, leaf = name.rpartition(".")
    value = getattr(model.get_submodule(owner), leaf)
    assert isinstance(value, Tensor)
    return value


def put_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Have `value` be the parameter or buffer `name`."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        module._parameters[leaf] = value if isinstance(value, nn.Parameter) else nn.Parameter(value, False)


def compute_buffers(model: Any, device_of: DeviceOf) -> None:
    """Compute the buffers that no file stores, as Transformers does after loading."""
    stored = set(model.state_dict())
    for _, tensor in all_tensors(model):
        tensor._is_hf_initialized = not tensor.is_meta  # type: ignore[attr-defined]
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        if buffer.is_meta and name not in stored:
            put_tensor(model, name, torch.empty_like(buffer, device=device_of(name)))
    with quiet_libraries(), no_random_traces():
        model.initialize_weights()


def _fixed_dtypes(model: Any, dtype: torch.dtype) -> list[tuple[re.Pattern[str], torch.dtype]]:
    """Parameters that an architecture keeps in float32 whatever the model runs in."""
    return [
        (re.compile(name.replace("*", ".*")), kept) for name, kept in model._get_dtype_plan(dtype).items()
    ]
