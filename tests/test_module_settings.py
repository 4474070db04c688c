"""`--module`: how a rule is read, what it says about a name, and which of several wins."""

from __future__ import annotations

from typing import Any

import pytest

from gptq_cli.config import HEAD_BITS, QuantizeConfig
from gptq_cli.errors import ConfigError
from gptq_cli.module_settings import ModuleRule, parse_module_rules, settings_for

DOWN = "model.layers.3.mlp.down_proj"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a.*.b=dense", ModuleRule(pattern="a.*.b", dense=True)),
        ("a.0-3=bits:8", ModuleRule(pattern="a.0-3", bits=8)),
        (" a = bits:8 , group:64 , sym ", ModuleRule(pattern="a", bits=8, group_size=64, sym=True)),
        ("a=group:-1,asym", ModuleRule(pattern="a", group_size=-1, sym=False)),
        ("a=group_size:32", ModuleRule(pattern="a", group_size=32)),
    ],
)
def test_a_rule_is_read_and_written(text: str, rule: ModuleRule) -> None:
    assert ModuleRule.parse(text) == rule
    assert ModuleRule.parse(str(rule)) == rule


def test_rules_as_texts_or_as_a_mapping() -> None:
    wanted = (ModuleRule(pattern="a.b", bits=8, group_size=64), ModuleRule(pattern="c", dense=True))
    assert parse_module_rules(["a.b=bits:8,group:64", "c=dense"]) == wanted
    assert parse_module_rules({"a.b": {"bits": 8, "group": 64}, "c": "dense"}) == wanted
    assert parse_module_rules({"a.b": "bits:8,group:64", "c": {"dense": True}}) == wanted
    assert parse_module_rules("c=dense") == wanted[1:]
    assert parse_module_rules(wanted) == wanted
    assert QuantizeConfig.of(modules={"c": "dense"}).modules == wanted[1:]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a", r"allowed: PATTERN=dense, or bits:N"),
        ("=dense", "allowed: PATTERN=dense"),
        ("a=", "allowed: dense, or bits:N"),
        ("a=bits:5", "bits is 5; allowed: 2, 3, 4, 8"),
        ("a=bits:four", "bits is 'four'; allowed: 2, 3, 4, 8"),
        ("a=bits", "bits is 'True'; allowed"),
        ("a=group:0", "group is 0; allowed: -1"),
        ("a=group:99999999999", "group is 99999999999; allowed: -1"),
        ("a=group:9999999999999999", "group is '9999999999999999'; allowed: -1"),
        ("a=bits:8,bits:4", "has bits twice"),
        ("a=sym,asym", "has sym twice"),
        ("a=dense,bits:8", "is dense and has settings"),
        ("a=desc_act:true", "desc_act cannot differ by module"),
        ("a=colour:red", "is 'colour:red'; allowed: dense"),
        ("a..b=dense", "empty component"),
        ("a.3-1=dense", "runs backwards"),
        ("a.**=dense", "is not a glob here"),
        ("rest=bits:8", "is everything"),
        ({"a": {}}, "has no settings"),
        ({"a": 8}, "a is 8; allowed: dense"),
        ({"a": {"dense": False}}, "allowed: dense"),
        ({"a": {"bits": True}}, "bits is 'True'"),
        (8, "modules is 8"),
        (["a=dense"] * 1001, "1001 settings by module; allowed: 1000"),
    ],
)
def test_what_is_no_rule(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_module_rules(value)


@pytest.mark.parametrize(("field", "says"), [("bits", "bits is 8.0"), ("group_size", "group is 8.0")])
def test_a_fraction_is_no_setting(field: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ModuleRule(pattern="a", **{field: 8.0})  # type: ignore[arg-type]


def settings(name: str, *texts: str) -> tuple[bool, int | None, int | None, bool | None]:
    found = settings_for(parse_module_rules(texts), name)
    return found.dense, found.bits, found.group_size, found.sym


def test_later_rules_win_setting_by_setting() -> None:
    assert settings(DOWN) == (False, None, None, None)
    assert settings(DOWN, "model.layers.4=bits:8") == (False, None, None, None)
    assert settings(DOWN, "model.layers.1*=bits:8") == (False, None, None, None)
    assert settings(DOWN, "model.layers.0-3=bits:8") == (False, 8, None, None)
    assert settings(DOWN, "model=bits:8,group:64", f"{DOWN}=bits:2") == (False, 2, 64, None)
    assert settings(DOWN, f"{DOWN}=bits:2", "model=bits:8,group:64") == (False, 8, 64, None)
    assert settings(DOWN, "model=bits:8", f"{DOWN}=dense") == (True, None, None, None)
    assert settings(DOWN, f"{DOWN}=bits:8", "model=dense", f"{DOWN}=asym") == (False, None, None, False)


def test_whether_a_rule_names_the_linear_itself() -> None:
    named = [settings_for(parse_module_rules(text), DOWN).named for text in ("model.layers.*=bits:8",
        "model.layers.*.mlp.*=bits:8", f"{DOWN}=dense")]  # fmt: skip
    assert named == [False, True, True]
    both = parse_module_rules([f"{DOWN}=bits:8", "model=group:64"])
    assert settings_for(both, DOWN).named


def test_the_configuration_of_one_linear() -> None:
    config = QuantizeConfig.of(bits=4, group_size=128, modules=["model.layers.*.mlp=bits:8,group:64"])
    own = config.of_linear(DOWN)
    assert (own.bits, own.group_columns, own.sym) == (8, 64, True)
    assert config.of_linear("model.layers.3.self_attn.q_proj") == config
    assert config.changed(DOWN) == {"bits": 8, "group_size": 64}
    assert config.changed("lm_head") == {}


def test_one_asymmetric_module_makes_the_format_v2() -> None:
    assert QuantizeConfig.of(modules="a=bits:8").checkpoint_format == "gptq"
    assert QuantizeConfig.of(modules="a=asym").checkpoint_format == "gptq_v2"
    assert QuantizeConfig.of(sym=False, modules="a=sym").checkpoint_format == "gptq_v2"


def test_settled_for_a_model() -> None:
    linears = [("a", 4096), ("b", 96)]
    assert QuantizeConfig().for_model(linears).group_size == 32
    assert QuantizeConfig.of(modules="b=group:-1").for_model(linears).group_size == 128
    with_head = QuantizeConfig.of(group_size=64, quantize_head=True, modules="lm_head=group:32")
    settled = with_head.for_model(linears, "lm_head")
    assert (settled.of_linear("lm_head").bits, settled.of_linear("lm_head").group_size) == (HEAD_BITS, 32)
    assert settled.for_model(linears, "lm_head") == settled
    among = QuantizeConfig.of(group_size=64, quantize_head=True, modules=["a=bits:3", "lm_head=bits:8"])
    assert among.for_model(linears, "lm_head") == among
    four = QuantizeConfig.of(group_size=64, quantize_head=True, modules="lm_head=bits:4")
    assert four.for_model(linears, "lm_head").changed("lm_head") == {}
    assert QuantizeConfig(group_size=64).for_model(linears, "lm_head").modules == ()
