"""From the names in a checkpoint to the names in a model, by Transformers' own rules.

Since version 5, a model's parameters may have other names than in its files: prefixes are added or removed,
parts are renamed, experts of a list are merged into one 3-D tensor. Transformers keeps these rules with each
model (`transformers.conversion_mapping`). They are used here unchanged, so that a quantized checkpoint keeps
the *source's own names* and every model that Transformers can load can be mapped. This needs only names; no
weight is read.

Two kinds of rule exist: a *renaming* keeps the tensor as it is, a *converter* computes (merges, splits,
transposes). A linear whose weight passes through a converter has no tensor of its own in the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from gptq_cli.devices.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NUMBER = re.compile(r"(\d+)")
_BY_PLACE = ""
"""Stands for a rule's pattern where a name is mapped without a rule."""


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts layer 2 before layer 10."""
    parts = _NUMBER.split(name)
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts if part)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where one tensor of the model comes from."""

    target: str
    """Name in the model; for a converter with several results, the first of them."""
    sources: tuple[str, ...]
    """Names in the files, in natural order."""
    converted: bool
    """True: computed from the sources; False: it is the one source."""


@dataclass(frozen=True, slots=True)
class KeyMap:
    """All origins of a model's tensors, and what is unmatched on both sides."""

    origins: Mapping[str, Origin]
    """Model tensor -> origin. Results of one converter share one origin."""
    unexpected: tuple[str, ...]
    """Names in the files that the model has no place for."""
    missing: tuple[str, ...]
    """Parameters without an origin, after ties and the model's own exceptions."""
    names: frozenset[str] = frozenset()
    """All names in the files."""

    def source_of(self, target: str) -> str | None:
        """The one file tensor that *is* the model tensor `target`, or None."""
        origin = self.origins.get(target)
        return None if origin is None or origin.converted else origin.sources[0]


class Conversion:
    """Transformers' key rules for one model (usually on the meta device)."""

    def __init__(self, model: PreTrainedModel) -> None:
        rules = get_model_conversion_mapping(model)
        self._model = model
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._by_pattern = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}
        self._state: dict[str, Tensor] = model.state_dict()
        self._targets: dict[str, tuple[str | None, str | None]] = {}

    def target_of(self, source: str) -> tuple[str | None, str | None]:
        """(model tensor, converter's pattern or None) for a name in the files; (None, None) if the model has
        no such tensor."""
        if source not in self._targets:
            self._targets[source] = self._find_target(source)
        return self._targets[source]

    def _find_target(self, source: str) -> tuple[str | None, str | None]:
        prefix = self._model.base_model_prefix
        target, pattern = rename_source_key(source, self._renamings, self._converters, prefix, self._state)
        if target not in self._state and source in self._state:
            target, pattern = rename_source_key(source, [], [], prefix, self._state)
        return (target, pattern) if target in self._state else (None, None)

    def place_of(self, source: str) -> int:
        """The position of a converted file tensor among the parts of its target: 0 for gate, 1 for up."""
        pattern = self.target_of(source)[1]
        return 0 if pattern is None else list(self._by_pattern[pattern].source_patterns).index(pattern)

    def own_names(self, origin: Origin, keys: KeyMap) -> dict[str, str]:
        """What the model tensors that are computed from `origin` can be called in files where each is stored
        as the model has it: beside its sources if such a name leads back, else its name in the model.

        {} where one of them has no such name.
        """
        names: dict[str, str] = {}
        for target in self._results(origin.target, self.target_of(origin.sources[0])[1]):
            module, _, kind = target.rpartition(".")
            beside = origin.sources[0].removesuffix(f".{kind}").rpartition(".")[0]
            near = f"{beside}.{module.rpartition('.')[2]}.{kind}"
            found = [n for n in (near, target) if n not in keys.names and self.target_of(n) == (target, None)]
            if not found:
                return {}
            names[target] = found[0]
        return names

    def source_names(self, targets: Iterable[str]) -> tuple[str, ...]:
        """The names in files that Transformers would give the model tensors `targets` on saving them.

        () where one of the model's rules cannot be run backwards.
        """
        tensors = {target: self._state[target] for target in targets}
        try:
            with torch.no_grad():
                return tuple(revert_weight_conversion(self._model, tensors)) if tensors else ()
        except Exception as error:  # an operation without a reverse, or one that needs more tensors
            if is_out_of_memory(error):
                raise
            return ()

    def map(self, names: Iterable[str], placed: Mapping[str, str] = MappingProxyType({})) -> KeyMap:
        """Map every name in the files. `placed`: names without a rule -> the model tensor that they are a
        part of."""
        collected: dict[str, list[str]] = {}
        patterns: dict[str, str | None] = {}
        unexpected: list[str] = []
        all_names = {*names, *placed}
        for name in sorted(all_names, key=natural_key):
            target, pattern = (placed[name], _BY_PLACE) if name in placed else self.target_of(name)
            if target is None:
                unexpected.append(name)
                continue
            collected.setdefault(target, []).append(name)
            patterns[target] = pattern
        origins: dict[str, Origin] = {}
        for target, sources in collected.items():
            origin = Origin(target, tuple(sources), patterns[target] is not None)
            for result in self._results(target, patterns[target]):
                origins[result] = origin
        return KeyMap(origins, tuple(unexpected), self._missing(origins), frozenset(all_names))

    def convert(self, origin: Origin, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the model's tensors of `origin` from its `tensors` (file name -> value)."""
        if not origin.converted:
            return {origin.target: tensors[origin.sources[0]]}
        rule: Any = None
        for source in origin.sources:
            target, pattern = self.target_of(source)
            assert target is not None
            assert pattern is not None
            if rule is None:
                rule = deepcopy(self._by_pattern[pattern])
            rule.add_tensor(target, source, pattern, tensors[source])
        with torch.no_grad():
            values = rule.convert(origin.target, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in values.items()}

    def parts(self, origin: Origin) -> dict[str, tuple[int | slice, ...]] | None:
        """File tensor -> which part of the target it is, where the rule only puts tensors together: experts
        one behind another, gate and up side by side. None where it does anything else."""
        if not origin.converted or len(origin.sources) < 2:
            return None
        rules = [self._by_pattern.get(self.target_of(source)[1] or "") for source in origin.sources]
        rule = rules[0]
        if rule is None or any(other is not rule for other in rules) or len(rule.target_patterns) > 1:
            return None
        shape = self._state[origin.target].shape
        patterns, doing = list(rule.source_patterns), [type(step) for step in rule.operations]
        wanted = [MergeModulelist] if len(patterns) == 1 else [MergeModulelist, Concatenate]
        along = [step.dim for step in rule.operations if hasattr(step, "dim")]
        if doing != wanted or along != [0, 1][: len(wanted)] or len(shape) != 3:
            return None
        rows, short = divmod(shape[1], len(patterns))
        seen = [0] * len(patterns)
        found: dict[str, tuple[int | slice, ...]] = {}
        for source in origin.sources:
            place = self.place_of(source)
            found[source] = (seen[place], slice(place * rows, (place + 1) * rows))
            seen[place] += 1
        return None if short or any(count != shape[0] for count in seen) else found

    def _results(self, target: str, pattern: str | None) -> tuple[str, ...]:
        """All model tensors that a converter makes when its first result is `target`."""
        if pattern in (None, _BY_PLACE):
            return (target,)
        first, *others = self._by_pattern[pattern].target_patterns
        return (target, *(name for o in others if (name := target.replace(first, o)) in self._state))

    def _missing(self, origins: Mapping[str, Origin]) -> tuple[str, ...]:
        ignored = [re.compile(p) for p in self._model._keys_to_ignore_on_load_missing or ()]
        groups: dict[int, list[str]] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        return tuple(
            names[0]
            for names in groups.values()
            if not any(name in origins or any(p.search(name) for p in ignored) for name in names)
        )


def tied_groups(model: torch.nn.Module) -> tuple[tuple[str, ...], ...]:
    """Names of parameters that are one tensor, in model order."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def total_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
