"""Numbers and names as people read them."""

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptq_cli.display import format as fmt
from gptq_cli.placement.device import format_size

NAMES = st.lists(st.text("abcdefgh_0123", min_size=1, max_size=12), min_size=1, max_size=8).map(".".join)


def test_tables_and_messages_write_sizes_alike() -> None:
    assert fmt.size is format_size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0004, "0 ms"),
        (0.25, "250 ms"),
        (12.34, "12.3 s"),
        (59.96, "1 min 00 s"),
        (75.2, "1 min 15 s"),
        (3599.9, "1 h 00 min"),
        (3720, "1 h 02 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert fmt.duration(seconds) == text


def test_clock_is_as_wide_when_nothing_is_known() -> None:
    assert fmt.clock(75.9) == "0:01:15"
    assert len(fmt.clock(None)) == len(fmt.clock(75.9))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0000"),
        (0.01234, "0.0123"),
        (1.5, "1.5000"),
        (1.23e-5, "1.2e-05"),
        (123.4, "1.2e+02"),
        (float("nan"), "nan"),
    ],
)
def test_loss_is_short(value: float, text: str) -> None:
    assert fmt.loss(value) == text


def test_change_says_nothing_where_it_means_nothing() -> None:
    assert fmt.change(0.4, 1.0) == "-60 %"
    assert fmt.change(1.04, 1.0) == "+4 %"
    assert fmt.change(1.0, 0.0) == fmt.change(float("nan"), 1.0) == ""


def test_a_name_loses_its_middle_first() -> None:
    name = "model.layers.3.self_attn.q_proj"
    assert fmt.shorten_name(name, 31) == name
    assert fmt.shorten_name(name, 25) == "model.….self_attn.q_proj"
    assert fmt.shorten_name(name, 14) == "model.….q_proj"
    assert fmt.shorten_name(name, 10) == "….q_proj"
    assert fmt.shorten("/srv/models/llama", 9) == "/s…/llama"


@given(NAMES, st.integers(1, 60))
def test_a_name_always_fits_and_keeps_its_last_component_when_there_is_room(name: str, width: int) -> None:
    shown = fmt.shorten_name(name, width)
    assert len(shown) <= width
    last = name.rpartition(".")[2]
    if width >= len(last) + 2:
        assert shown.endswith(last)


def test_a_linear_is_named_by_its_block_number() -> None:
    assert fmt.short_linear("model.layers.3.mlp.up_proj", "model.layers.3") == "3.mlp.up_proj"
    assert fmt.short_linear("up", "h") == "up"


def test_a_wrapped_command_is_the_same_command() -> None:
    command = "gptq quantize some/model --device-map 'a=0, b=1' --bits 4 --no-desc-act --out DIR"
    lines = fmt.wrap_command(command, 40)
    assert lines == [
        "gptq quantize some/model \\",
        "  --device-map 'a=0, b=1' --bits 4 \\",
        "  --no-desc-act --out DIR",
    ]
    assert max(map(len, lines)) <= 40
    assert shlex.split("\n".join(lines).replace("\\\n", " ")) == shlex.split(command)


@given(st.lists(st.text("ab=,-\"' 1", min_size=1, max_size=30).map(shlex.quote), min_size=1, max_size=9))
def test_wrapping_never_changes_what_the_shell_reads(words: list[str]) -> None:
    command = " ".join(["gptq", *words])
    lines = fmt.wrap_command(command, 30)
    assert shlex.split("\n".join(lines).replace("\\\n", " ")) == shlex.split(command)
