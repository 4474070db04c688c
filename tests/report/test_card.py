"""The model card: what the Hub reads of it, what stands in it, and that nothing from outside is markup."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from gptq_cli.config import ModelRef, QuantizeConfig, QuantizeJob
from gptq_cli.findings import Finding
from gptq_cli.jobs.settings import settings_of
from gptq_cli.report.card import PLOT, card_files, code, command, text
from gptq_cli.results.card import CARD, HERE, CardFacts, SourceCard, renamed
from gptq_cli.results.kept import KeptDense, OwnSettings
from gptq_cli.results.load import Agreement, RuleResult, TargetReport
from gptq_cli.results.run import RunReport, TextShare
from tests.display.events import load_report, report
from tests.report.pages import scores

EVIL = "<img src=x onerror=alert(1)> [a](http://evil) `x` | **b**\n# no\u202e"


def facts(**changes: Any) -> CardFacts:
    error = Finding(rule="r", level="error", subject="s", message="reads float16 scales <only>")
    held: dict[str, Any] = {
        "name": "org/quantized",
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "calibration": ("pydoc",),
        "source": SourceCard(license="apache-2.0", language=("en",), tags=("chat",)),
        "pipeline_tag": "text-generation",
        "targets": (
            TargetReport(target="vllm", rules=()),
            TargetReport(target="sglang", rules=(RuleResult("r", "about", (error,)),)),
            TargetReport(target="transformers", rules=()),
        ),
        "digests": (("model.safetensors", "ab" * 32),),
    }
    return CardFacts(**(held | changes))


def front(card: str) -> dict[str, Any]:
    held = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(held, dict)
    return held


def one_text(source: str) -> TextShare:
    return TextShare(source=source, weight=1.0, samples=128, tokens=65536)


def made(run: RunReport | None = None, **changes: Any) -> str:
    return card_files(run or report(), facts(**changes))[CARD]


def test_the_front_matter_is_what_the_hub_reads() -> None:
    assert front(made()) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "language": ["en"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "quantized_by": "gptq-cli",
        "tags": ["chat", "gptq", "4-bit", "gptq-cli"],
    }


def test_bits_that_no_linear_has_are_not_named() -> None:
    run = report()
    own = OwnSettings(name="model.*", bits=3, group_size=64, sym=True, linears=len(run.linears))
    card = made(replace(run, own_settings=(own,)))
    assert "GPTQ 3 bits" in card
    assert "4 bits" not in card
    assert front(card)["tags"] == ["chat", "gptq", "3-bit", "gptq-cli"]
    some = made(replace(run, own_settings=(replace(own, linears=own.linears - 1),)))
    assert "GPTQ 3 and 4 bits" in some


def test_a_source_without_a_card_leaves_its_fields_out() -> None:
    held = front(made(source=SourceCard(), base_model=""))
    assert not held.keys() & {"license", "language", "base_model", "base_model_relation"}
    assert held["tags"] == ["gptq", "4-bit", "gptq-cli"]


def test_only_the_readers_that_take_it_are_named_with_a_command() -> None:
    card = made()
    assert "vllm serve org/quantized" in card
    assert "sglang.launch_server" not in card
    assert "- SGLang does not take it: reads float16 scales &lt;only&gt;" in card
    assert "from_pretrained('org/quantized'" in card
    assert "gptq load DIR" in card


def test_times_hosts_and_paths_of_the_machine_are_not_in_it() -> None:
    run = replace(report(), out="/home/me/out", calibration_texts=(one_text("/home/me/text.txt"),))
    later = replace(run, seconds=9e4, phase_seconds=(("open", 77.0),), out="/elsewhere", devices=("cuda:7",))
    one, other = (card_files(x, facts(calibration=("/home/me/text.txt",))) for x in (run, later))
    assert one == other
    assert "/home" not in "".join(one.values())
    assert "--calibration text.txt" in one[CARD]


def test_every_source_of_text_is_named() -> None:
    shares = (one_text("/home/me/chat.jsonl:messages"), one_text("pydoc"))
    run = replace(report(), tokens=131072, calibration_texts=shares)
    card = made(run, calibration=("/home/me/chat.jsonl:messages*0.5", "pydoc*0.5"))
    assert "--calibration 'chat.jsonl:messages*0.5' --calibration 'pydoc*0.5'" in " ".join(card.split())
    assert "128 x 512 = 65,536 tokens (50%) of chat.jsonl:messages" in card
    assert "/home" not in card


def test_the_command_names_every_option_that_is_not_a_default() -> None:
    config = QuantizeConfig(bits=3, group_size=64, sym=False, refit=False, desc_act=True)
    job = QuantizeJob(model=ModelRef(model="M"), out="O", quantize=config)
    settings = settings_of(job, revision=None, card=True, proof=None)
    words = command(replace(report(), settings=settings), facts())
    assert words[:5] == ["gptq", "quantize", "HuggingFaceTB/SmolLM2-135M", "--revision", report().revision]
    assert {"--bits", "3", "--asym", "--no-refit", "--desc-act"} <= set(words)
    assert "--sweeps" not in words


def test_what_is_measured_is_shown_and_nothing_else() -> None:
    assert "perplexity" not in made()
    agreement = Agreement(tokens=512, windows=2, perplexity=12.5, dense_perplexity=12.0, kl=0.0123, top1=0.9)
    measured = replace(load_report(), perplexity=12.5, windows=2, seq_len=256, agreement=agreement)
    card = made(replace(report(), proof=measured))
    assert "| perplexity | 12.500 |" in card
    assert "| KL(dense, quantized) | 0.0123 nats per token |" in card
    assert "2 windows of 256 tokens" in card


def test_what_stays_dense_is_listed_with_the_reason() -> None:
    kept = (KeptDense(name="model.layers.*.mlp.gate", reason="a router", linears=3, weights=9),)
    assert "- `model.layers.*.mlp.gate`: a router, 3 linears" in made(replace(report(), kept_dense=kept))


def test_the_plot_is_a_file_of_its_own_with_a_text_alternative() -> None:
    files = card_files(report(), facts())
    root = ET.fromstring(files[PLOT])
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    names = {child.tag.rpartition("}")[2] for child in root}
    assert {"title", "desc", "style"} <= names
    assert "prefers-color-scheme: dark" in files[PLOT]
    assert re.search(rf"!\[Mean loss of each of 3 blocks.*\]\({PLOT}\)", files[CARD])
    assert "--s0" not in files[PLOT]


def test_nothing_from_outside_becomes_markup() -> None:
    kept = (KeptDense(name=EVIL, reason=EVIL, linears=1, weights=9),)
    run = replace(report(), kept_dense=kept, calibration_texts=(one_text(EVIL),), dense_modules=(EVIL,))
    files = card_files(run, facts(name=EVIL, base_model=EVIL, source=SourceCard(license=EVIL, tags=(EVIL,))))
    card = files[CARD]
    assert "\u202e" not in card
    assert front(card)["license"].startswith("<img")  # YAML text, whole
    outside = re.sub(r"(?s)^(`{3,}).*?^\1$", "", card.split("---\n", 2)[2], flags=re.MULTILINE)
    outside = re.sub(r"(`+) ?.*?(?<!`)\1(?!`)", "", outside)
    assert "<" not in outside
    assert "[a](" not in outside
    assert "http://" not in outside
    assert len(front(card)["tags"]) == 4


def test_text_and_code_hold_one_line() -> None:
    assert text("a_b\n*c* <d>") == r"a\_b \*c\* &lt;d&gt;"
    assert code("a`b|c") == r"`` a`b\|c ``"


def test_scores_on_tasks_are_one_table_and_stand_in_the_front_matter() -> None:
    card = made(replace(report(), proof=replace(load_report(), perplexity=None, tasks=scores())))
    assert "| `arc_easy` | `acc_norm` | 0.4213 ± 0.0101 | 0.4312 | 0 | 2,376 |" in card
    assert "| `a_group` | `acc` | 0.4213 |  |  |  |" in card
    assert "perplexity" not in card
    results = ModelCard(card).data.eval_results
    assert results is not None
    found = [(one.dataset_name, one.metric_type, one.metric_value) for one in results]
    assert found == [("arc_easy", "acc_norm", 0.4213), ("a_group", "acc", 0.4213)]


def test_the_hubs_own_reader_takes_the_front_matter() -> None:
    """`ModelCard` parses it, and what it would write again says the same."""
    for changes in ({}, {"base_model": "", "source": SourceCard()}):
        card = made(report(), **changes)
        data = ModelCard(card).data
        assert data.to_dict() == front(card)
        assert ModelCardData(**front(card)).to_dict() == front(card)
        assert data.library_name == "transformers"
        assert data.license == front(card).get("license")


def test_a_card_is_renamed_where_it_names_the_directory_and_nowhere_else() -> None:
    everyone = tuple(TargetReport(target=x, rules=()) for x in ("vllm", "sglang", "transformers"))
    for purpose in ("text-generation", "image-text-to-text"):
        here = made(name=HERE, targets=everyone, pipeline_tag=purpose)
        assert renamed(here, "me/model") == made(name="me/model", targets=everyone, pipeline_tag=purpose)
    assert renamed("gptq load DIR --prompt x\nvllm serve DIRECTORY\n'DIR'", "n") == (
        "gptq load DIR --prompt x\nvllm serve DIRECTORY\n'DIR'"
    )
