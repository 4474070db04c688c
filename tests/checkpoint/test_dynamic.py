"""`dynamic` says of every linear what we did with it, under each reader's own name for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_cli.checkpoint.dynamic import Override, render
from gptq_cli.targets.names import FUSED

Decision = Override | None
"""None: dense."""
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LINEAR_ATTENTION = tuple(f"linear_attn.{x}_proj" for x in ("out",)) + tuple(
    f"linear_attn.in_proj_{x}" for x in ("qkv", "z", "a", "b")
)
DENSE, PLAIN, EIGHT, WIDE = None, Override(), Override(bits=8), Override(bits=8, group_size=64)


def lookup(dynamic: Mapping[str, Mapping[str, Any]], name: str) -> Decision:
    """As all three readers do it: in order, `re.match`, the first wins."""
    for key, fields in dynamic.items():
        if key.startswith("-:"):
            if re.match(key.removeprefix("-:"), name):
                return DENSE
        elif re.match(key.removeprefix("+:"), name):
            return Override(**fields)
    return PLAIN


def fused(name: str) -> str:
    """The name of the matrix that servers load a linear into."""
    owner, _, leaf = name.rpartition(".")
    for parts, (matrix, *_) in FUSED.items():
        if leaf in parts and ".experts." not in name:
            return f"{owner}.{matrix}"
    return re.sub(r"\.experts\.\d+\..*", ".experts", name)


def gptqmodel(name: str) -> str:
    return name


def vllm(name: str) -> str:
    """Its mapper puts `language_model.` in front, takes `model.` from towers, and fuses."""
    name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
    name = re.sub(r"^model\.(visual|vision_tower|multi_modal_projector)\.", r"\1.", name)
    return fused(name)


def sglang(name: str) -> str:
    """`model.language_model.` becomes `model.`, the names of towers lose `model.`, and it fuses."""
    name = re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", name)
    return fused(re.sub(r"^model\.(visual|vision_tower|multi_modal_projector)\.", r"\1.", name))


READERS: tuple[Callable[[str], str], ...] = (gptqmodel, vllm, sglang)


def holds(decisions: Mapping[str, Decision]) -> dict[str, dict[str, int | bool]]:
    """Render, and compare with every reader's look-up; matrices whose parts differ have no answer."""
    quantized = {name: value for name, value in decisions.items() if value is not None}
    dynamic = render(quantized, [name for name, value in decisions.items() if value is None])
    for key in dynamic:
        re.compile(key[2:])
    for reader in READERS:
        wanted: dict[str, set[Decision]] = {}
        for name, value in decisions.items():
            wanted.setdefault(reader(name), set()).add(value)
        for name, values in wanted.items():
            if len(values) == 1:
                assert {lookup(dynamic, name)} == values, (reader.__name__, name, dynamic)
    return dynamic


def blocks(prefix: str, count: int, *kinds: str) -> Iterator[str]:
    for number in range(count):
        yield from (f"{prefix}.{number}.{kind}" for kind in kinds)


def plain(names: Iterator[str]) -> dict[str, Decision]:
    return dict.fromkeys(names, PLAIN)


def test_all_alike_needs_nothing() -> None:
    assert holds(plain(blocks("model.layers", 12, *ATTENTION, *MLP))) == {}


def test_a_block_is_not_the_one_whose_number_begins_with_its_own() -> None:
    names = plain(blocks("model.layers", 12, *ATTENTION, *MLP))
    first = {name: DENSE if ".layers.1." in name else value for name, value in names.items()}
    assert list(holds(first)) == [r"-:(.*\.)?layers\.1(\..*)?$"]


def test_gates_of_a_hybrid_with_tower_and_draft_layers() -> None:
    prefix = "model.language_model.layers"
    names = plain(blocks(prefix, 4, *ATTENTION, *MLP, *LINEAR_ATTENTION))
    names |= dict.fromkeys(blocks(prefix, 4, "linear_attn.in_proj_a", "linear_attn.in_proj_b"), DENSE)
    names |= dict.fromkeys(blocks(prefix, 4, "linear_attn.conv1d"), DENSE)
    names |= dict.fromkeys(blocks("model.visual.blocks", 2, "attn.qkv", "mlp.up_proj"), DENSE)
    names |= dict.fromkeys(blocks("mtp.layers", 1, *ATTENTION, *MLP), DENSE) | {"mtp.fc": DENSE}
    assert list(holds(names)) == [
        r"-:(.*\.)?layers\.\d+\.linear_attn\.(conv1d|in_proj_a|in_proj_b|in_proj_ba)(\..*)?$",
        r"-:(.*\.)?visual(\..*)?$",
        r"-:(.*\.)?mtp(\..*)?$",
    ]


def test_draft_layers_that_follow_the_blocks() -> None:
    """DeepSeek's are `model.layers.61` behind blocks 0 to 60."""
    kinds = (*ATTENTION, *(f"mlp.experts.{expert}.up_proj" for expert in range(3)))
    names = plain(blocks("model.layers", 3, *kinds))
    names |= dict.fromkeys((f"model.layers.3.{kind}" for kind in (*kinds, "eh_proj")), DENSE)
    assert list(holds(names)) == [r"-:(.*\.)?layers\.3(\..*)?$"]


def test_a_matrix_beside_linears_never_covers_them() -> None:
    """Mamba's mixer holds A_log itself, and in_proj, x_proj and out_proj."""
    names = plain(blocks("backbone.layers", 2, "mixer.in_proj", "mixer.out_proj"))
    names |= dict.fromkeys(blocks("backbone.layers", 2, "mixer.conv1d"), DENSE)
    quantized = {name: value for name, value in names.items() if value is not None}
    dense = [name for name in names if names[name] is None]
    mixers = list(blocks("backbone.layers", 2, "mixer"))
    assert render(quantized, [*mixers, *dense]) == holds(names)


def test_part_of_a_fused_matrix_does_not_name_it() -> None:
    names = plain(blocks("model.layers", 2, *ATTENTION))
    names |= dict.fromkeys(blocks("model.layers", 2, "self_attn.q_proj", "self_attn.k_proj"), DENSE)
    assert "qkv_proj" not in str(holds(names))


def test_settings_of_experts_reach_the_name_of_all_of_them() -> None:
    experts = tuple(f"mlp.experts.{e}.{kind}" for e in range(4) for kind in ("gate_proj", "down_proj"))
    names = plain(blocks("model.layers", 3, *ATTENTION, *experts))
    names |= dict.fromkeys(blocks("model.layers", 3, *experts), WIDE)
    names |= dict.fromkeys(blocks("model.layers", 3, "mlp.gate"), DENSE)
    assert holds(names) == {
        r"-:(.*\.)?layers\.\d+\.mlp\.gate(\..*)?$": {},
        r"+:(.*\.)?layers\.\d+\.mlp(\..*)?$": {"bits": 8, "group_size": 64},
    }


def test_a_head_has_settings_of_its_own() -> None:
    names = plain(blocks("model.layers", 2, *MLP)) | {"lm_head": EIGHT}
    assert holds(names) == {r"+:(.*\.)?lm_head(\..*)?$": {"bits": 8}}


def test_two_decoders_are_told_apart() -> None:
    names = plain(blocks("thinker.model.layers", 2, *MLP))
    names |= dict.fromkeys(blocks("talker.model.layers", 2, *MLP), DENSE)
    assert list(holds(names)) == [r"-:(.*\.)?talker(\..*)?$"]
    names = plain(blocks("thinker.model.layers", 2, *MLP))
    names |= dict.fromkeys(blocks("model.layers", 2, *MLP), DENSE)
    assert list(holds(names)) == [r"-:model\.layers(\..*)?$"]


def test_a_module_goes_by_both_of_its_names() -> None:
    quantized = dict.fromkeys(blocks("model.layers", 2, *ATTENTION))
    dense = list(blocks("model.layers", 2, "block_sparse_moe.gate"))
    dynamic = render(quantized, dense, {name: name.replace("block_sparse_moe", "mlp") for name in dense})
    for name in ("model.layers.1.block_sparse_moe.gate", "model.layers.0.mlp.gate"):
        assert lookup(dynamic, name) is DENSE
    assert lookup(dynamic, "model.layers.1.self_attn.q_proj") == PLAIN


def test_long_lists_of_numbers_are_split() -> None:
    names = plain(blocks("model.layers", 1000, *MLP))
    odd = {name: DENSE if int(name.split(".")[2]) % 2 else value for name, value in names.items()}
    dynamic = holds(odd)
    assert 1 < len(dynamic) < 10
    assert max(map(len, dynamic)) < 1000


KINDS = (*ATTENTION, *MLP, *LINEAR_ATTENTION, "linear_attn.conv1d", "mlp.gate", "mlp.shared_expert.up_proj")
EXPERTS = tuple(f"mlp.experts.{e}.{kind}" for e in (0, 1, 10) for kind in ("gate_proj", "up_proj"))


@settings(deadline=None, max_examples=60)
@given(
    prefix=st.sampled_from(["model.layers", "model.language_model.layers", "transformer.h", "layers"]),
    count=st.integers(1, 12),
    kinds=st.sets(st.sampled_from([*KINDS, *EXPERTS]), min_size=1, max_size=10),
    by_kind=st.dictionaries(st.sampled_from([*KINDS, *EXPERTS]), st.sampled_from([DENSE, EIGHT, WIDE])),
    by_block=st.dictionaries(st.integers(0, 11), st.sampled_from([DENSE, EIGHT, PLAIN]), max_size=4),
    alone=st.lists(st.tuples(st.integers(0, 11), st.sampled_from(KINDS)), max_size=3),
    more=st.sampled_from(["", "model.visual.blocks", "mtp.layers", "model.vision_tower.layers"]),
)
def test_any_tree(
    prefix: str,
    count: int,
    kinds: set[str],
    by_kind: dict[str, Decision],
    by_block: dict[int, Decision],
    alone: list[tuple[int, str]],
    more: str,
) -> None:
    names: dict[str, Decision] = {}
    for number in range(count):
        for kind in sorted(kinds):
            value = by_block.get(number, by_kind.get(kind, PLAIN))
            names[f"{prefix}.{number}.{kind}"] = DENSE if (number, kind) in alone else value
    if more:
        names |= dict.fromkeys(blocks(more, 2, *sorted(kinds)), DENSE)
    holds(names)


def test_the_check_can_fail() -> None:
    assert lookup({r"-:(.*\.)?layers\.1": {}}, "model.layers.10.mlp.up_proj") is DENSE
    with pytest.raises(AssertionError):
        assert lookup({}, "model.layers.10.mlp.up_proj") is DENSE
