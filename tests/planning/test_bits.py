"""A budget of bits: what may be chosen, for whom; the best choice; and the settings that it becomes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from gptq_cli.config import QuantizeConfig
from gptq_cli.model.facts import LinearFact, ModelFacts
from gptq_cli.module_settings import parse_module_rules
from gptq_cli.planning.bits import Bits, Budget, FusedLinears, fused_linears, settled
from gptq_cli.planning.memory import packed_bytes, quantized_bytes
from gptq_cli.readers import Target
from tests.preflight.shapes import llama

HEAD = LinearFact(name="lm_head", block="", in_features=1024, out_features=32000)
ALL = {2, 3, 4, 8, None}


def config(**fields: Any) -> QuantizeConfig:
    return QuantizeConfig.of(**{"group_size": 128, **fields})


def sets(
    facts: ModelFacts | None = None, *targets: Target, tp: int = 1, **fields: Any
) -> tuple[FusedLinears, ...]:
    return fused_linears(facts or llama(blocks=2), config(**fields), targets, tp)


def moe(experts: int = 4) -> ModelFacts:
    """A Llama whose MLPs are experts."""
    facts = llama(blocks=2)
    kept = [x for x in facts.linears if "self_attn" in x.name]
    for block in facts.blocks:
        for number, (name, rows, columns) in itertools.product(
            range(experts), (("gate_proj", 512, 1024), ("up_proj", 512, 1024), ("down_proj", 1024, 512))
        ):
            full = f"{block}.mlp.experts.{number}.{name}"
            stage = 2 if columns == 1024 else 3
            kept.append(
                LinearFact(
                    name=full, block=block, in_features=columns, out_features=rows, stage=stage, routed=True
                )
            )
    return replace(facts, linears=tuple(kept))


def test_linears_that_are_fused_are_one_set() -> None:
    found = sets(replace(llama(blocks=2), head=HEAD))
    assert [tuple(name.rpartition(".")[2] for name in one.names) for one in found[:4]] == [
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj",),
        ("gate_proj", "up_proj"),
        ("down_proj",),
    ]
    assert len(found) == 9
    assert found[-1].names == ("lm_head",)
    assert all(set(one.sizes_bytes) == ALL for one in found)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_sizes_are_those_of_the_tensors(bits: int) -> None:
    facts = llama(blocks=1)
    for one in sets(facts):
        own = config(bits=bits)
        assert one.sizes_bytes[bits] == sum(packed_bytes(linear, own) for linear in one.linears)
        assert one.sizes_bytes[None] == 2 * one.weights


def test_what_does_not_fill_words_is_not_offered() -> None:
    facts = llama(blocks=1)
    narrow = tuple(replace(x, out_features=1028) if x.name.endswith("o_proj") else x for x in facts.linears)
    by_name = {one.names[-1].rpartition(".")[2]: one for one in sets(replace(facts, linears=narrow))}
    assert set(by_name["o_proj"].sizes_bytes) == {8, None}
    assert set(by_name["down_proj"].sizes_bytes) == ALL
    assert set(sets(replace(facts, linears=narrow), group_size=96)[0].sizes_bytes) == {None}


@pytest.mark.parametrize(
    ("target", "allowed"), [("vllm", {4, 8, None}), ("sglang", {4, 8, None}), ("gptqmodel", ALL)]
)
def test_what_a_target_reads(target: Target, allowed: set[Bits]) -> None:
    found = sets(None, target)
    assert all(set(one.sizes_bytes) == allowed and not one.at_base for one in found)


def test_a_reader_without_settings_by_module_gets_one_number_of_bits() -> None:
    found = sets(replace(llama(blocks=2), head=HEAD), "transformers")
    assert all(one.at_base and set(one.sizes_bytes) == {2, 3, 4, 8} for one in found[:-1])
    assert set(found[-1].sizes_bytes) == {None}
    budget = Budget(found, lambda bits: sum(map(FusedLinears.size_at, found, bits)))
    spent = budget.spend(budget.range().most_bytes - 1, lambda one, bits: 1 / (bits or 99))
    assert spent is not None
    assert spent.bits == (*[4] * 8, None)


def test_a_reader_of_four_bits_gets_four_bits_or_dense() -> None:
    assert all(set(one.sizes_bytes) == {4, None} for one in sets(None, "exllamav2"))
    assert all(set(one.sizes_bytes) == {4} for one in sets(None, "exllamav2", "transformers"))


def test_experts_of_sglang_have_the_bits_of_the_checkpoint() -> None:
    found = sets(moe(), "sglang")
    experts = [one for one in found if ".experts." in one.names[0]]
    assert [len(one.linears) for one in experts] == [12, 12]
    assert all(one.at_base and set(one.sizes_bytes) == {4, 8} for one in experts)
    assert not any(one.at_base for one in found if one not in experts)
    chosen = settled(config(), found, [8 if one in experts else 4 for one in found])
    assert chosen.bits == 8  # though the attention has more weights
    assert chosen.of_linear("model.layers.1.mlp.experts.3.up_proj").bits == 8
    assert chosen.of_linear("model.layers.1.self_attn.o_proj").bits == 4
    assert all(".experts." not in rule.pattern for rule in chosen.modules)


def test_settings_by_module_hold() -> None:
    rules = parse_module_rules(["model.layers.0.mlp.down_proj=bits:8", "model.layers.1.self_attn=group:64"])
    found = {one.names: one for one in sets(modules=rules)}
    down = found["model.layers.0.mlp.down_proj",]
    assert set(down.sizes_bytes) == {8}
    attention = found[tuple(f"model.layers.1.self_attn.{name}_proj" for name in "qkv")]
    assert (
        attention.sizes_bytes[4]
        > found[tuple(f"model.layers.0.self_attn.{x}_proj" for x in "qkv")].sizes_bytes[4]
    )
    chosen = settled(config(modules=rules), tuple(found.values()), [3] * len(found))
    assert chosen.of_linear("model.layers.0.mlp.down_proj").bits == 8
    assert chosen.of_linear("model.layers.1.self_attn.q_proj").group_size == 64
    assert chosen.modules[-2:] == rules


def file_bytes(facts: ModelFacts, found: Sequence[FusedLinears]) -> Any:
    """The size of the file by the same rules as the plan's; dense sets are taken out of the facts."""

    def of(bits: tuple[Bits, ...]) -> int:
        dense = {name for one, held in zip(found, bits, strict=True) if held is None for name in one.names}
        left = replace(facts, linears=tuple(x for x in facts.linears if x.name not in dense))
        return quantized_bytes(left, settled(config(), found, bits)) + 1000  # a header

    return of


@pytest.mark.parametrize("seed", range(4))
def test_the_best_choice_within_the_budget(seed: int) -> None:
    facts = llama(blocks=1, hidden=256, inner=512, vocab=500)
    found = sets(facts)
    size = file_bytes(facts, found)
    scale = [1.0, 10.0**seed, 0.3, 3.0]
    numbers = {one.names: number for number, one in enumerate(found)}

    def loss(one: FusedLinears, bits: Bits) -> float:
        return 0.0 if bits is None else scale[numbers[one.names]] * one.weights * 4.0**-bits

    every = list(itertools.product(*[one.sizes_bytes for one in found]))
    sized = [(size(bits), sum(map(loss, found, bits))) for bits in every]
    reach = Budget(found, size).range()
    assert (reach.least_bytes, reach.most_bytes) == (min(sized)[0], max(sized)[0])
    for part in (0.0, 0.1, 0.37, 0.7, 1.0):
        budget = round(reach.least_bytes + part * (reach.most_bytes - reach.least_bytes))
        spent = Budget(found, size).spend(budget, loss)
        assert spent is not None
        assert spent.size_bytes == size(spent.bits) <= budget
        best = min(lost for total, lost in sized if total <= budget)
        assert sum(map(loss, found, spent.bits)) == pytest.approx(best, rel=1e-9)
    assert Budget(found, size).spend(reach.least_bytes - 1, loss) is None


def test_headers_that_grow_with_the_choice_are_counted() -> None:
    """What the sizes of the sets do not say is found by asking for the file, and the budget is kept."""
    facts = llama(blocks=2, hidden=256, inner=512, vocab=500)
    found = sets(facts)
    size = file_bytes(facts, found)

    def odd(bits: tuple[Bits, ...]) -> int:
        return size(bits) + 700 * sum(held is not None and held > 3 for held in bits)

    budget = odd((3,) * len(found)) + 20_000
    spent = Budget(found, odd).spend(
        budget, lambda one, bits: 0.0 if bits is None else one.weights * 4.0**-bits
    )
    assert spent is not None
    assert odd(spent.bits) == spent.size_bytes <= budget
    assert spent.size_bytes > budget - 10_000


def test_a_file_a_few_bytes_too_large_is_not_the_end() -> None:
    """The choice that was first found leaves more room than it is over: the next one is a little smaller."""
    facts = llama(blocks=4, hidden=256, inner=512, vocab=500)
    found = sets(facts)
    size = file_bytes(facts, found)

    def odd(bits: tuple[Bits, ...]) -> int:
        return size(bits) + (8 if len(set(bits)) > 1 else 0)

    reach = Budget(found, odd).range()
    for budget in range(reach.least_bytes + 40_000, reach.least_bytes + 60_000, 997):
        spent = Budget(found, odd).spend(budget, lambda one, bits: one.weights * 4.0 ** -(bits or 99))
        assert spent is not None
        assert budget - 30_000 < spent.size_bytes <= budget


def test_the_settings_of_a_choice() -> None:
    facts = replace(llama(blocks=4), head=HEAD)
    found = sets(facts)
    bits: list[Bits] = [4] * len(found)
    for number, one in enumerate(found):
        if one.names[0].endswith("down_proj"):
            bits[number] = 8 if "layers.0" in one.names[0] or "layers.1" in one.names[0] else 3
        if one.names == ("model.layers.2.self_attn.o_proj",):
            bits[number] = None
    bits[-1] = 8
    chosen = settled(config(), found, bits)
    assert list(map(str, chosen.modules)) == [
        "model.layers.0-1.mlp.down_proj=bits:8",
        "model.layers.2-3.mlp.down_proj=bits:3",
        "model.layers.2.self_attn.o_proj=dense",
        "lm_head=bits:8",
    ]
    assert (chosen.bits, chosen.quantize_head, chosen.bits_per_weight) == (4, True, None)
    for one, held in zip(found, bits, strict=True):
        for name in one.names:
            assert held is None or chosen.of_linear(name).bits == held, name
    assert not settled(config(), found, [*bits[:-1], None]).quantize_head


def test_experts_of_a_block_are_one_rule() -> None:
    found = sets(moe())
    bits = [3 if ".experts." in one.names[0] and "layers.1" in one.names[0] else 4 for one in found]
    assert sorted(map(str, settled(config(), found, bits).modules)) == [
        f"model.layers.1.mlp.experts.*.{name}_proj=bits:3" for name in ("down", "gate", "up")
    ]


def test_mixed_bits_have_to_gain_something() -> None:
    facts = llama(blocks=2, hidden=256, inner=512, vocab=500)
    found = sets(facts)
    budget = Budget(found, file_bytes(facts, found))
    uniform = budget.uniform(3)
    assert uniform is not None

    def alike(one: FusedLinears, bits: Bits) -> float:
        return one.weights * 4.0 ** -(bits or 99)

    def unlike(one: FusedLinears, bits: Bits) -> float:
        return alike(one, bits) * (100.0 if one.names[0].endswith("o_proj") else 1.0)

    for loss, mixed in ((alike, False), (unlike, True)):
        spent = budget.spend(uniform.size_bytes + 100, loss)
        assert spent is not None
        plainest = budget.plainest(spent, uniform.size_bytes + 100, loss, 0.1)
        assert (plainest == spent != uniform) if mixed else (plainest == uniform), mixed
    assert budget.plainest(spent, uniform.size_bytes - 1, unlike, 0.1) != uniform


def test_what_the_same_bits_everywhere_come_to() -> None:
    facts = replace(llama(blocks=1), head=HEAD)
    found = sets(facts)
    budget = Budget(found, file_bytes(facts, found))
    assert budget.uniform(3) is not None
    assert budget.uniform(3).bits == (3, 3, 3, 3, None)
    with_head = sets(facts, quantize_head=True)
    assert Budget(with_head, lambda bits: 1).uniform(3).bits == (3, 3, 3, 3, 8)
    assert Budget(sets(None, "transformers"), lambda bits: 1).uniform(3) is not None
    refused = Budget(sets(replace(facts, head=HEAD), "vllm"), lambda bits: 1)
    assert [bits for bits in (2, 3, 4, 8) if refused.uniform(bits) is not None] == [4, 8]
    every = Budget(sets(facts, modules=parse_module_rules(["model.layers=bits:8"])), lambda bits: 1)
    assert every.uniform(4) is None  # there is nothing to give them to
    assert Budget(sets(None, "exllamav2", "transformers"), lambda bits: 1).uniform(3) is None
    rules = parse_module_rules(["model.layers.0.mlp.down_proj=bits:8", "lm_head=bits:4"])
    given = sets(facts, quantize_head=True, modules=rules)
    assert Budget(given, lambda bits: 1).uniform(3).bits == (3, 3, 3, 8, 4)


def test_a_head_that_is_the_embedding_costs_nothing_dense() -> None:
    facts = replace(llama(tied=True), head=HEAD)
    assert sets(facts)[-1].sizes_bytes[None] == 0
    assert None not in sets(facts, quantize_head=True)[-1].sizes_bytes
