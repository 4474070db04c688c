"""The device-map text: every spelling, round trips, errors with a caret, and hostile input."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_cli.errors import DeviceMapError
from gptq_cli.placement.device import CPU, Device
from gptq_cli.placement.device_map import STRATEGIES, DeviceMap, DeviceRule, MaxMemory
from gptq_cli.placement.placement import parse_inventory

CUDA0, CUDA1 = Device("cuda", 0), Device("cuda", 1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies(strategy: str) -> None:
    assert DeviceMap.parse(strategy) == DeviceMap(strategy=strategy)
    assert str(DeviceMap.parse(f" {strategy} ")) == strategy


@pytest.mark.parametrize(
    "value", [0, "0", "cuda:0", "cuda", torch.device("cuda:0"), {"": 0}, '{"": "cuda:0"}', "rest=0"]
)
def test_one_device_for_everything(value: object) -> None:
    assert DeviceMap.parse(value) == DeviceMap(rules=(DeviceRule("", CUDA0),))
    assert str(DeviceMap.parse(value)) == "cuda:0"


SAME_MAP = [
    "model.embed_tokens=0,model.layers.0-15=0,model.layers.16-31=1,rest=cpu",
    " model.embed_tokens = 0 , model.layers.0-15=cuda:0, model.layers.16-31 = cuda:1 ,rest= cpu ",
    '{"model.embed_tokens": 0, "model.layers.0-15": "0", "model.layers.16-31": "cuda:1", "": "cpu"}',
    {
        "model.embed_tokens": 0,
        "model.layers.0-15": CUDA0,
        "model.layers.16-31": torch.device("cuda:1"),
        "rest": "cpu",
    },
]


@pytest.mark.parametrize("value", SAME_MAP)
def test_the_same_map_in_every_spelling(value: object) -> None:
    parsed = DeviceMap.parse(value)
    assert parsed == DeviceMap.parse(SAME_MAP[0])
    assert str(parsed) == (
        "model.embed_tokens=cuda:0,model.layers.0-15=cuda:0,model.layers.16-31=cuda:1,rest=cpu"
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '{"model.layers.0": 1, "": "cpu"}'),
        ("a.json", '\ufeff\n{"model.layers.0": "cuda:1", "rest": "cpu"}\n'),
        ("a.toml", '"model.layers.0" = 1\nrest = "cpu"\n'),
        ("a.toml", 'rest = "cpu"\nmodel.layers.0 = 1\n'),
        ("a.toml", '[model.layers]\n0 = "cuda:1"\n\n["rest"]\n'.replace('["rest"]\n', "")),
        ("a.toml", '[device_map]\n"model.layers.0" = 1\nrest = "cpu"\n'),
        ("a.toml", 'device_map = "model.layers.0=1,rest=cpu"\n'),
    ],
)
def test_files(tmp_path: Path, name: str, content: str) -> None:
    file = tmp_path / name
    file.write_text(content, encoding="utf-8")
    rules = DeviceMap.parse(f"@{file}").rules
    assert DeviceRule("model.layers.0", CUDA1) in rules
    assert set(rules) <= {DeviceRule("model.layers.0", CUDA1), DeviceRule("", CPU)}


def test_the_map_of_a_file_needs_no_file_afterwards(tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    file.write_text('{"lm_head": "cpu", "": 0}')
    parsed = DeviceMap.parse(f"@{file}")
    file.unlink()
    assert DeviceMap.parse(str(parsed)) == parsed


@pytest.mark.parametrize(
    ("text", "position", "said", "hint"),
    [
        ("", 0, "is empty", "auto"),
        ("   ", 0, "is empty", "auto"),
        ("AUTO", 0, "lower case", "write auto"),
        ("Balanced", 0, "lower case", "write balanced"),
        ("gpu", 0, "not a device map", "write cuda"),
        (" gpu:3", 1, "not a device map", "write cuda:3"),
        ("-1", 0, "negative", "count from 0"),
        ("a=0,b=coda,c=1", 6, "'coda' is not a device", "cuda:0"),
        ("a=0,,b=1", 4, "empty entry", "comma"),
        ("a=0,b", 4, "'b' has no device", ""),
        ("a=0,=1", 4, "name missing", "rest=1"),
        ("a=0=1", 3, "second '='", "commas"),
        ("a=", 2, "value missing", ""),
        ("a=0,a=1", 4, "given twice", "one of the two"),
        ("a..b=0", 2, "empty component", ""),
        (".a=0", 0, "empty component", ""),
        ("a.**.b=0", 2, "'**'", "leave ** out"),
        ("x.15-3=0", 2, "runs backwards", "3-15"),
        ("a b=0", 1, "cannot stand in the module name", ""),
        ("layers.1=-1", 9, "negative", "count from 0"),
        ("[1]", 0, "not an object", ""),
        ('"auto"', 0, "not an object", ""),
        ("{", 1, "not valid JSON", ""),
        ('{"a', 1, "not valid JSON: unterminated string; expected", ""),
        ("{}", 0, "is empty", "auto"),
        ('{"a": 0 "b": 1}', 8, "',' or '}'", ""),
        ('{"a": 0,}', 8, "module name expected", ""),
        ('{"a" 0}', 5, "':' expected", ""),
        ('{"a": 1.5}', 6, "1.5 is not a device for 'a'", ""),
        ('{"a": null}', 6, "null is not a device", ""),
        ('{"a": true}', 6, "true is not a device", ""),
        ('{"a": [0]}', 6, "[0] is not a device", ""),
        ('{"a": -2}', 6, "out of range", ""),
        ("{3: 0}", 1, "double quotes", ""),
        ('{"a": 0} x', 9, "unexpected text", ""),
        ('{"a": 0, "a": 1}', 9, "given twice", ""),
        ("@", 1, "file name missing", ""),
        ("@map.yaml", 1, "not a device-map file", ""),
        ("@nowhere.json", 1, "no such file", "current directory"),
    ],
)
def test_errors_point_at_the_character(text: str, position: int, said: str, hint: str) -> None:
    with pytest.raises(DeviceMapError) as caught:
        DeviceMap.parse(text)
    error = caught.value
    assert said in error.message
    assert hint in (error.hint or "")
    assert error.position == position
    line, caret = error.message.splitlines()[-2:]
    if text.strip() and len(text) <= 40:
        assert line == f"  {text}"
        assert caret.index("^") - 2 == position


def test_caret_of_a_long_line_stays_under_its_character() -> None:
    text = ",".join(f"model.layers.{i}=0" for i in range(60)) + ",lm_head=coda,rest=cpu"
    with pytest.raises(DeviceMapError) as caught:
        DeviceMap.parse(text)
    line, caret = caught.value.message.splitlines()[-2:]
    assert line[caret.index("^") :].startswith("coda")
    assert len(line) < 80


def test_error_in_a_file_names_the_file_and_shows_its_line(tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    file.write_text('{\n  "model.layers.0": 0,\n  "lm_head": "gpu"\n}\n')
    with pytest.raises(DeviceMapError) as caught:
        DeviceMap.parse(f"@{file}")
    assert str(file)[-60:] in caught.value.message
    line, caret = caught.value.message.splitlines()[-2:]
    assert line == '    "lm_head": "gpu"'
    assert line[caret.index("^") :].startswith('"gpu"')


@pytest.mark.parametrize("content", [b"", b"  ", b"[]", b"\xff\xfe", b'{"a": {"b": 0}}', b"nonsense"])
def test_bad_json_files(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "map.json"
    file.write_bytes(content)
    with pytest.raises(DeviceMapError):
        DeviceMap.parse(f"@{file}")


@pytest.mark.parametrize(
    "content",
    ["a = ", "a = 1.5", "a = [0]", "", 'device_map = "@other.toml"', "a = 2020-01-01", "a." * 9999 + "b = 0"],
    ids=lambda text: text[:20],
)
def test_bad_toml_files(tmp_path: Path, content: str) -> None:
    file = tmp_path / "map.toml"
    file.write_text(content)
    with pytest.raises(DeviceMapError):
        DeviceMap.parse(f"@{file}")


def test_a_device_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "d.json").mkdir()
    with pytest.raises(DeviceMapError, match="no such file"):
        DeviceMap.parse(f"@{tmp_path / 'd.json'}")


@pytest.mark.parametrize(
    ("pattern", "name", "covers"),
    [
        ("model.layers.1", "model.layers.1", True),
        ("model.layers.1", "model.layers.1.mlp.up_proj.weight", True),
        ("model.layers.1", "model.layers.10", False),
        ("model.layers.1", "model.layers", False),
        ("model.layers.0-15", "model.layers.15.mlp", True),
        ("model.layers.0-15", "model.layers.16.mlp", False),
        ("model.layers.0-15", "model.layers.x.mlp", False),
        ("model.layers.0-15", "model.layers.٣", False),
        ("model.layers.1*", "model.layers.19.mlp", True),
        ("model.*", "model.norm.weight", True),
        ("*.norm", "model.norm.weight", True),
        ("*.norm", "model.layers.0.norm", False),
        ("*norm", "model.norm", False),
        ("model.layers.[02]", "model.layers.2.mlp", True),
        ("", "anything.at.all", True),
    ],
)
def test_names_are_matched_by_whole_components(pattern: str, name: str, covers: bool) -> None:
    assert DeviceRule(pattern, CPU).covers(name) is covers


def test_the_more_specific_rule_wins_wherever_it_stands() -> None:
    text = "model.layers.3.mlp=3,model.layers.3=2,model.layers.0-7=1,model.layers.*=0,rest=cpu"
    for ordered in (text, ",".join(reversed(text.split(",")))):
        device_map = DeviceMap.parse(ordered)
        found = {
            name: str(rule.device)
            for name in (
                "model.layers.3.mlp.up",
                "model.layers.3.attn",
                "model.layers.4",
                "model.layers.9",
                "lm_head",
            )
            if (rule := device_map.rule_for(name))
        }
        assert found == {
            "model.layers.3.mlp.up": "cuda:3",
            "model.layers.3.attn": "cuda:2",
            "model.layers.4": "cuda:1",
            "model.layers.9": "cuda:0",
            "lm_head": "cpu",
        }


def test_of_equally_specific_rules_the_later_wins() -> None:
    device_map = DeviceMap.parse("model.layers.0-7=0,model.layers.5-9=1")
    rule = device_map.rule_for("model.layers.6")
    assert rule is not None
    assert rule.device == CUDA1
    assert device_map.rule_for("lm_head") is None


def test_bare_indexes_follow_the_machine() -> None:
    device_map = DeviceMap.parse("model.layers.0=1,lm_head=cuda:1,rest=cpu").on("xpu")
    assert [str(rule.device) for rule in device_map.rules] == ["xpu:1", "cuda:1", "cpu"]
    assert DeviceMap.parse("0").on("mps").rules[0].device == Device("mps")
    assert DeviceMap.parse("auto").on("xpu") == DeviceMap(strategy="auto")


names = st.lists(
    st.from_regex(r"[a-z_]{1,8}|[0-9]{1,2}|[0-4]-[5-9]|\*|[a-z]{1,3}\*", fullmatch=True),
    min_size=1,
    max_size=4,
).map(".".join)
devices = st.one_of(
    st.sampled_from([CPU, Device("mps"), Device("disk"), Device("meta")]),
    st.builds(Device, st.sampled_from(["cuda", "xpu", "npu"]), st.integers(0, 99)),
)
maps = st.one_of(
    st.builds(lambda s: DeviceMap(strategy=s), st.sampled_from(STRATEGIES)),
    st.dictionaries(st.one_of(names, st.just("")), devices, min_size=1, max_size=6).map(
        lambda found: DeviceMap(rules=tuple(DeviceRule(name, device) for name, device in found.items()))
    ),
)


@given(maps)
def test_parse_of_str_is_the_map(device_map: DeviceMap) -> None:
    if any(rule.pattern == "rest" for rule in device_map.rules):
        return
    assert DeviceMap.parse(str(device_map)) == device_map


@given(
    st.dictionaries(
        devices.filter(lambda d: d.kind not in ("disk", "meta")), st.integers(0, 2**50), min_size=1
    )
)
def test_parse_of_str_is_the_limits(limits: dict[Device, int]) -> None:
    made = MaxMemory(tuple(limits.items()))
    assert MaxMemory.parse(str(made)) == made


HOSTILE = [
    "a" * 100_000,
    "a=0," * 20_000,
    '{"' + "a." * 50_000 + '": 0}',
    "[" * 100_000,
    '{"a":' * 50_000,
    '{"a": ' + "9" * 5000 + "}",
    "9" * 5000,
    "cuda:" + "9" * 5000,
    "x." + "9" * 5000 + "-1=0",
    "a=0\x00b=1",
    "@\x00.json",
    "@" + "a/" * 5000 + ".json",
    "model.layers.\u0661=0",
    "\u202eotua",
    "a=cuda:\u0660",
    "{'a': 0}",
    '{"a": 0}{"b": 1}',
    '{"\\ud800": 0}',
    "auto,auto",
    "disk=disk=disk",
    "model.layers.[=0",
    "model.layers.[!]=0",
    "@/dev/null.json",
    "=",
    ",",
    "{,}",
    "nan",
    '{"a": NaN}',
    '{"a": Infinity}',
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts_give_a_short_clear_error_or_a_map(text: str) -> None:
    said = ""
    try:
        parsed = DeviceMap.parse(text)
    except DeviceMapError as error:
        said = f"{error.message} {error.hint or 'none'}"
    else:
        assert DeviceMap.parse(str(parsed)) == parsed
    assert len(said.encode("utf-8")) < 1500


words = ["auto", "cuda", "cpu", "disk", "model", "layers", "rest", "16", "null", "true", "1e9", "GiB", "GB"]
pieces = st.sampled_from([*"0:=,{}\"'@.-*[] \n\\\x00é5b", *words])
texts = st.one_of(st.text(max_size=60), st.lists(pieces, max_size=25).map("".join))


@settings(max_examples=400)
@given(texts)
def test_no_text_raises_anything_else(text: str) -> None:
    for parse in (DeviceMap.parse, MaxMemory.parse, parse_inventory, Device.parse):
        with suppress(DeviceMapError):
            parsed = parse(text)
            if isinstance(parsed, DeviceMap | MaxMemory):
                assert type(parsed).parse(str(parsed)) == parsed


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=6,
)


@given(values)
def test_no_json_raises_anything_else(value: object) -> None:
    for candidate in (value, json.dumps(value)):
        with suppress(DeviceMapError):
            assert DeviceMap.parse(candidate).rules


def test_inventory_with_cards() -> None:
    found = parse_inventory("cuda:0=24GiB@4090, 1=80GiB@H100 ,cpu=64GiB")
    assert [(str(b.device), b.total_bytes >> 30, b.card) for b in found] == [
        ("cuda:0", 24, "4090"),
        ("cuda:1", 80, "h100"),
        ("cpu", 64, ""),
    ]
    with pytest.raises(DeviceMapError, match=r"'@rtx' is not a card .* allowed after '@': t4, ") as caught:
        parse_inventory("cpu=1GiB,cuda:0=24GiB@rtx")
    assert caught.value.position == len("cpu=1GiB,cuda:0=24GiB")
    with pytest.raises(DeviceMapError, match="is not a size"):
        parse_inventory("cuda:0=24Gi@4090")
    with pytest.raises(DeviceMapError, match="'@h100' names a card, but the cpu is not one") as caught:
        parse_inventory("cuda:0=24GiB@h100, cpu=64GiB@h100")
    assert caught.value.position == len("cuda:0=24GiB@h100, cpu=64GiB")
    with pytest.raises(DeviceMapError, match="'cuda:0' has no size; allowed: NAME=SIZE"):
        parse_inventory("cuda:0,cpu=64GiB")


def test_inventory() -> None:
    found = parse_inventory("cuda:0=24GiB,1=24GiB,cpu=64GiB")
    assert [(str(b.device), b.total_bytes, b.free_bytes) for b in found] == [
        ("cuda:0", 24 * 2**30, 24 * 2**30),
        ("cuda:1", 24 * 2**30, 24 * 2**30),
        ("cpu", 64 * 2**30, 64 * 2**30),
    ]
    with pytest.raises(DeviceMapError, match=r"^devices: "):
        parse_inventory("24GiB")


@pytest.mark.parametrize(
    ("what", "text"), [("devices", "cuda:0=24,cpu=64GiB"), ("max memory", "0=6GiB,cpu=20")]
)
def test_sizes_without_a_unit_show_both_readings_and_where(what: str, text: str) -> None:
    with pytest.raises(
        DeviceMapError, match=f"{what}: 2[04] has no unit: 2[04] bytes, or 2[04] GiB"
    ) as caught:
        MaxMemory.parse(text, what=what)
    lines = caught.value.message.splitlines()
    assert lines[1][lines[2].index("^")] == "2"
    with pytest.raises(DeviceMapError, match="has no unit"):
        MaxMemory.parse({0: 24})


def test_small_limits_are_written_so_that_they_are_read_again() -> None:
    limits = MaxMemory.parse("0=1000B,cpu=0,1=1048577")
    assert MaxMemory.parse(str(limits)) == limits
