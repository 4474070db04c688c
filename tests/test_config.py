"""What a job may ask: gates have their measurement, sampling means something, pairs suffice to judge."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args

import pytest

from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig
from gptq_cli.errors import ConfigError
from gptq_cli.fields import parse_group_size
from gptq_cli.load_job import HELD_OUT, LoadJob, Sampling, proof_job
from gptq_cli.readers import parse_targets
from gptq_cli.recipes import RECIPE_FIELDS, RECIPES, Recipe


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; allowed: 0 .greedy. to 100"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0; allowed: above 0, at most 1"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": 1.0, "top_k": -1}, "top_k is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"top_p": 0.9}, "top_p is 0.9, but temperature is 0, which is greedy"),
        ({"top_k": 5}, "top_k is 5, but temperature is 0"),
    ],
)
def test_sampling_options_are_judged(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**wrong)


@pytest.mark.parametrize("bits", [4.0, True, "4", None])
def test_bits_are_a_whole_number(bits: Any) -> None:
    with pytest.raises(ConfigError, match=f"bits is {bits!r}; allowed: 2, 3, 4, 8"):
        QuantizeConfig(bits=bits)


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (CalibrationConfig, "samples"),
        (CalibrationConfig, "seq_len"),
        (CalibrationConfig, "batch_size"),
        (CalibrationConfig, "seed"),
        (QuantizeConfig, "column_batch"),
        (QuantizeConfig, "sweeps"),
        (Sampling, "seed"),
    ],
)
@pytest.mark.parametrize("digits", [20, 400, 5000])
def test_a_number_beyond_all_use_is_named(kind: Any, field: str, digits: int) -> None:
    """torch and floats overflow on such a number, and Python does not even write the last one out."""
    with pytest.raises(ConfigError, match=f"^{field} is .+; allowed: a whole number from [0-9]+ to [0-9]+"):
        kind(**{field: 10**digits})


@pytest.mark.parametrize(
    ("wrong", "message", "hint"),
    [
        ({"max_kl": 0.1}, "max_kl is 0.1, but nothing is measured for it", "--against DENSE"),
        ({"max_kl": 0.1, "evaluate": "pydoc"}, "nothing is measured", "--against DENSE"),
        ({"max_perplexity": 9.0}, "max_perplexity is 9.0, but nothing", "--eval SOURCE"),
        ({"max_kl": -0.1, "against": "D"}, "max_kl is -0.1; allowed: a number of at least 0", None),
        ({"max_kl": float("nan"), "against": "D"}, "max_kl is nan", None),
        ({"max_perplexity": float("inf"), "evaluate": "pydoc"}, "max_perplexity is inf", None),
        ({"against": ""}, "against is empty", None),
        ({"evaluate": ""}, "eval is empty; allowed: pydoc-heldout", "leave it out"),
        ({"targets": ("vlm",)}, "target is 'vlm'; allowed: vllm, sglang", None),
        ({"kernel": "marlin"}, "kernel is 'marlin'; allowed: auto, torch, dequantize, gptqmodel", None),
    ],
)
def test_a_load_job_is_judged(wrong: dict[str, Any], message: str, hint: str | None) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        LoadJob(path="DIR", **wrong)
    assert hint is None or hint in (caught.value.hint or "")


def test_a_proof_on_no_text_is_not_left_out_in_silence() -> None:
    with pytest.raises(ConfigError, match="eval is empty"):
        proof_job(
            "DIR", "MODEL", evaluate="", against_source=False, max_kl=None, max_perplexity=None, tasks=None,
            bench=False, device_map=None, dtype="auto", trust_remote_code=False,
        )  # fmt: skip


def test_what_is_measured_on() -> None:
    assert LoadJob(path="D").text is None
    assert LoadJob(path="D", evaluate="a.txt", against="M").text == "a.txt"
    assert LoadJob(path="D", against="M", max_kl=0.1, max_perplexity=20.0).text == HELD_OUT


@pytest.mark.parametrize(
    ("asked", "opens"),
    [
        ({}, True),
        ({"verify": True}, False),
        ({"targets": ("vllm",)}, False),
        ({"verify": True, "prompt": "x"}, True),
        ({"verify": True, "evaluate": "pydoc"}, True),
        ({"targets": ("vllm",), "against": "M"}, True),
        ({"targets": ("vllm",), "bench": True}, True),
    ],
)
def test_files_alone_are_enough_to_judge_them(asked: dict[str, Any], opens: bool) -> None:
    assert LoadJob(path="D", **asked).opens is opens


def test_each_reader_once() -> None:
    assert parse_targets(["vllm", "sglang", "vllm"]) == ("vllm", "sglang")
    assert parse_targets([], 4) == ("vllm", "sglang")
    assert parse_targets(["transformers", "vllm"], 4) == ("transformers", "vllm")
    with pytest.raises(ConfigError, match=r"^tp is 4, .* but target is exllamav2$"):
        parse_targets(["exllamav2"], 4)
    for wrong in (0, -2, 65, True):
        with pytest.raises(ConfigError, match=r"^tp is "):
            parse_targets(["vllm"], wrong)


@pytest.mark.parametrize(
    ("share", "samples", "seq_len", "paired"),
    [
        (0.25, 128, 2048, 32),
        (1.0, 128, 2048, 128),
        (0.25, 128, 512, 128),
        (0.25, 512, 512, 128),
        (0.25, 1024, 512, 256),
        (0.0625, 128, 512, 32),
        (0.25, 512, 500, 132),
        (0.25, 32, 16384, 16),
        (0.25, 8, 2048, 8),
        (0.3, 200, 2048, 60),
        (0.01, 1, 1, 1),
    ],
)
def test_pairs_are_a_share_and_enough_to_judge(share: float, samples: int, seq_len: int, paired: int) -> None:
    assert QuantizeConfig(solve_for="dense", dense_share=share).paired_samples(samples, seq_len) == paired
    assert QuantizeConfig(solve_for="own", dense_share=share).paired_samples(samples, seq_len) == 0


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("caf\udce9 au lait", "prompt is not UTF-8: byte 0xe9 at character 4"),
        ("\ud83d", r"prompt is not UTF-8: half a pair, U\+D83D, at character 1"),
    ],
)
def test_a_prompt_is_a_text(prompt: str, found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        LoadJob(path="DIR", prompt=prompt)
    assert LoadJob(path="DIR", prompt="\x00 naïve \ufeff 😀").prompt is not None


@pytest.mark.parametrize(
    ("columns", "group"),
    [
        ([4096, 14336], 128),
        ([576, 1536], 64),
        ([96, 160], 32),
        ([128], 128),
        ([64, 48], 32),
        ([7], 32),
        ([], 128),
    ],
)
def test_auto_is_the_largest_group_that_divides_every_linear(columns: list[int], group: int) -> None:
    found = QuantizeConfig().for_columns(columns)
    assert (found.group_size, found.group_columns) == (group, group)
    assert found == QuantizeConfig(group_size=group)
    assert found.for_columns([32]) is found


def test_a_group_size_that_was_asked_for_stays() -> None:
    assert QuantizeConfig(group_size=48).for_columns([4096]).group_size == 48
    assert QuantizeConfig(group_size=-1).for_columns([7]).groups(7) == 1


def test_auto_is_no_number_before_a_model_is_known() -> None:
    with pytest.raises(ConfigError, match="group_size is 'auto'"):
        _ = QuantizeConfig().group_columns


@pytest.mark.parametrize(
    ("text", "value"), [("auto", "auto"), ("64", 64), ("-1", -1), (" 32 ", 32), (16, 16)]
)
def test_group_sizes(text: object, value: object) -> None:
    assert parse_group_size(text) == value


@pytest.mark.parametrize("text", ["0", "-2", "many", "", "6.4", True, None, 1.0, "AUTO"])
def test_what_is_no_group_size(text: object) -> None:
    with pytest.raises(
        ConfigError, match=r"allowed: -1 \(one group per row\), a positive whole number, or auto"
    ):
        QuantizeConfig(group_size=parse_group_size(text))


@pytest.mark.parametrize("model", ["models/q\udcff", "\udc80"])
def test_a_model_is_named_in_text(model: str) -> None:
    with pytest.raises(ConfigError, match="not UTF-8 text") as caught:
        ModelRef(model=model)
    assert caught.value.hint == "give the directory a name in UTF-8"


def test_a_recipe_is_a_set_of_overrides() -> None:
    assert set(RECIPES) == set(get_args(Recipe))
    assert {field.name for field in fields(QuantizeConfig)} >= RECIPE_FIELDS
    assert QuantizeConfig.of() == QuantizeConfig.of("balanced") == QuantizeConfig()
    assert QuantizeConfig.of("fast") == QuantizeConfig(sweeps=0, refit=False, dense_share=0.0625)
    assert QuantizeConfig.of("best") == QuantizeConfig(sweeps=4, dense_share=1.0, fisher_tokens=32_768)


@pytest.mark.parametrize("recipe", ["best", "max"])
def test_a_recipe_asks_nothing_of_a_dense_model_that_is_not_there(recipe: Recipe) -> None:
    found = QuantizeConfig.of(recipe, solve_for="own")
    assert (found.sweeps, found.fisher_tokens, found.tune_epochs) == (4, 0, 0)
    with pytest.raises(ConfigError, match="fisher_tokens is 64; allowed with solve_for own: 0"):
        QuantizeConfig.of(recipe, solve_for="own", fisher_tokens=64)


def test_what_is_given_wins_over_the_recipe_and_none_is_not_given() -> None:
    found = QuantizeConfig.of("best", sweeps=2, refit=False, dense_share=None, bits=3, group_size="64")
    assert found == QuantizeConfig(
        sweeps=2, refit=False, dense_share=1.0, fisher_tokens=32_768, bits=3, group_size=64
    )
    assert QuantizeConfig.of("best", sweeps=0).sweeps == 0
    assert QuantizeConfig.of("fast", refit=None) == QuantizeConfig.of("fast")


@pytest.mark.parametrize(
    ("recipe", "given", "message"),
    [
        ("bset", {}, "recipe is 'bset'; allowed: fast, balanced, best, max"),
        ("best", {"sweeps": -1}, "sweeps is -1"),
        ("fast", {"group_size": "many"}, "group_size is 'many'"),
    ],
)
def test_a_configuration_of_a_recipe_is_validated(recipe: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizeConfig.of(recipe, **given)


@pytest.mark.parametrize("config", [QuantizeConfig, CalibrationConfig])
def test_every_field_has_its_help(config: type) -> None:
    assert all(field.metadata["help"].endswith(".") for field in fields(config))
