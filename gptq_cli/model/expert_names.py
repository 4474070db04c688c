"""What the linears of fused experts are called in files, and back.

Files of most architectures hold the experts one by one, `…experts.7.w1.weight`, and Transformers merges
them by a rule of `model.conversion`. Packed experts keep those names: the rules say which file tensor becomes
which part of which parameter, and run backwards they give the names where the files hold the merged
parameter. Where an architecture has no such rule (gpt-oss, Llama 4), its files always hold merged parameters;
there a linear is called by its place, `…experts.7.gate_proj`, as GPTQModel calls it.

A name is used only if it leads back to the same linear.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from gptq_cli.model.conversion import Conversion, KeyMap, natural_key
from gptq_cli.model.experts import FoundExperts
from gptq_cli.model.fused import FusedExperts, FusedTensor

_WEIGHT = ".weight"
_LAYER = re.compile(r"\A(.*?\.\d+)\.(.+)\Z")
_NUMBER = re.compile(r"\A(?P<parent>.+)\.(?P<expert>\d+)(?:\.(?P<role>[^.]+))?\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertPlace:
    """Where one linear of one expert belongs."""

    linear: str
    """Module in the unfused model: `model.layers.3.mlp.experts.7.gate_proj`."""
    module: str
    """The module of the experts."""
    tensor: FusedTensor
    role: str
    expert: int
    by_rule: bool
    """Transformers has a rule for its name in the files."""

    @property
    def target(self) -> str:
        """The model's parameter that holds it."""
        return f"{self.module}.{self.tensor.leaf}"

    @property
    def bias_target(self) -> str | None:
        """The model's parameter that holds its bias."""
        return None if self.tensor.bias is None else f"{self.module}.{self.tensor.bias}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSource:
    """What the files have of one linear of one expert."""

    name: str
    """Its own name, under which it is stored packed: `…experts.7.w1`."""
    tensors: tuple[str, ...]
    """The tensor that holds its weight now: `…experts.7.w1.weight`, or a merged one; or those that the merged
    one is made of."""
    place: ExpertPlace


class ExpertNames:
    """The names of the linears of `experts`, modules of the model of `conversion`."""

    def __init__(self, conversion: Conversion, experts: Iterable[FusedExperts]) -> None:
        self._conversion = conversion
        self._experts = tuple(experts)
        self._tensors = {f"{x.name}.{t.leaf}": (x, t) for x in self._experts for t in x.tensors}
        self._leaves: dict[str, list[str]] = {}
        for leaf, role in sorted({(t.leaf, role) for _, t in self._tensors.values() for role in t.roles}):
            self._leaves.setdefault(role, []).append(leaf)

    def place(self, source: str) -> ExpertPlace | None:
        """The linear that is called `source` in files (`…experts.7.w1`); None for any other name."""
        found = _NUMBER.match(source)
        if found is None or not self._tensors:
            return None
        target, pattern = self._conversion.target_of(f"{source}{_WEIGHT}")
        if target in self._tensors and pattern is not None and "*" in pattern:
            roles = self._tensors[target][1].roles
            at = self._conversion.place_of(f"{source}{_WEIGHT}")
            role = roles[at] if at < len(roles) else None
            return self._placed(target, role, int(found["expert"]), by_rule=True)
        role = found["role"] or ""
        for leaf in self._leaves.get(role, ()):
            target = self._conversion.target_of(f"{found['parent']}.{leaf}")[0]
            if target in self._tensors:
                return self._placed(target, role, int(found["expert"]), by_rule=False)
        return None

    def sources(self, keys: KeyMap) -> dict[str, ExpertSource]:
        """Linear in the unfused model -> its names in the files of `keys`.

        Modules one of whose linears cannot be named, or is not in the files, are missing.
        """
        derived = self._derived(keys)
        result: dict[str, ExpertSource] = {}
        for module in self._experts:
            named: dict[str, ExpertSource] = {}
            for tensor in module.tensors:
                named |= self._named(module, tensor, keys, derived.get(f"{module.name}.{tensor.leaf}", ()))
            if all(name in named for name, *_ in module.linears()):
                result |= named
        return result

    def _placed(self, target: str, role: str | None, expert: int, *, by_rule: bool) -> ExpertPlace | None:
        module, tensor = self._tensors[target]
        if role is None or role not in tensor.roles or expert >= tensor.experts:
            return None
        return ExpertPlace(
            linear=f"{module.name}.{tensor.linear(role, expert)}",
            module=module.name,
            tensor=tensor,
            role=role,
            expert=expert,
            by_rule=by_rule,
        )

    def _named(
        self, module: FusedExperts, tensor: FusedTensor, keys: KeyMap, derived: Sequence[str]
    ) -> Mapping[str, ExpertSource]:
        """The names of the linears of one parameter."""
        target = f"{module.name}.{tensor.leaf}"
        origin = keys.origins.get(target)
        held = (target,) if origin is None else origin.sources
        if len(held) > 1:
            single = self._accepted(target, ((name.removesuffix(_WEIGHT), (name,)) for name in held))
            if single:
                return single
        whole = held[0]
        parent = whole.removesuffix(f".{tensor.leaf}") if whole.endswith(f".{tensor.leaf}") else module.name
        if derived:
            tails = [name.removesuffix(_WEIGHT) for name in derived]
            near = [_moved(tail, whole) for tail in tails]
            by_rule = self._accepted(target, zip(near, [held] * len(near), strict=True)) or self._accepted(
                target, zip(tails, [held] * len(tails), strict=True)
            )
            if by_rule:
                return by_rule
        for above in dict.fromkeys((parent, module.name)):
            names = [
                f"{above}.{tensor.linear(role, expert)}"
                for expert in range(tensor.experts)
                for role in tensor.roles
            ]
            found = self._accepted(target, zip(names, [held] * len(names), strict=True))
            if found:
                return found
        return {}

    def _accepted(self, target: str, names: Iterable[tuple[str, tuple[str, ...]]]) -> dict[str, ExpertSource]:
        """(name, tensors) pairs by the linear that each leads back to; {} if one leads elsewhere."""
        result: dict[str, ExpertSource] = {}
        for name, held in names:
            place = self.place(name)
            if place is None or place.target != target or place.linear in result:
                return {}
            result[place.linear] = ExpertSource(name=name, tensors=held, place=place)
        return result

    def _derived(self, keys: KeyMap) -> dict[str, list[str]]:
        """Parameter that the files hold merged -> the names that its matrices have by Transformers' rules."""
        merged = [
            target
            for target in self._tensors
            if (origin := keys.origins.get(target)) is None or len(origin.sources) == 1
        ]
        result: dict[str, list[str]] = {}
        for name in self._conversion.source_names(merged):
            target, pattern = self._conversion.target_of(name)
            if target in self._tensors and pattern is not None and "*" in pattern:
                result.setdefault(target, []).append(name)
        return {target: sorted(names, key=natural_key) for target, names in result.items()}


def named_experts(
    found: FoundExperts, conversion: Conversion, keys: KeyMap, tied: tuple[tuple[str, ...], ...]
) -> tuple[FoundExperts, Mapping[str, ExpertSource]]:
    """The experts whose linears can be named in files, and their names; the others stay dense."""
    sources = ExpertNames(conversion, found.experts).sources(keys)
    shared = {name for group in tied for name in group}
    experts, dense = [], dict(found.dense)
    for module in found.experts:
        parameters = [f"{module.name}.{tensor.leaf}" for tensor in module.tensors]
        if shared & set(parameters):
            dense |= dict.fromkeys(parameters, "its parameters are shared with another module")
        elif any(name not in sources for name, *_ in module.linears()):
            dense |= dict.fromkeys(parameters, "its experts have no names of their own in a checkpoint")
        else:
            experts.append(module)
    return FoundExperts(experts=tuple(experts), dense=dense), sources


def linears_in_part(experts: FoundExperts, quantized: Set[str]) -> frozenset[str]:
    """Linears whose parameter would be quantized in part: it is quantized whole, or stays dense."""
    result: set[str] = set()
    for module in experts.experts:
        for tensor in module.tensors:
            names = set(module.linears_of(tensor))
            if not names <= quantized:
                result |= names
    return frozenset(result)


def _moved(name: str, beside: str) -> str:
    """`name` in the layer of the tensor `beside`: files may call the layers otherwise than a model that was
    never loaded from files would."""
    own, other = _LAYER.match(name), _LAYER.match(beside)
    return f"{other[1]}.{own[2]}" if own and other else name


def merged_names(
    names: ExpertNames, sources: Iterable[str], held: Mapping[str, object]
) -> Iterator[tuple[str, str]]:
    """(file tensor, model parameter) of packed experts `sources` that no rule of Transformers maps: their
    weights, and the biases among the tensors `held`."""
    for source in sources:
        place = names.place(source)
        if place is None:
            continue
        if not place.by_rule:
            yield f"{source}{_WEIGHT}", place.target
        if place.bias_target is not None and f"{source}.bias" in held:
            yield f"{source}.bias", place.bias_target
