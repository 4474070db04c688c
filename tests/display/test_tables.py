"""Results as text: complete, readable without colour, no line wider than the page."""

import io
from dataclasses import replace

import pytest
from rich.console import Console, RenderableType

from gptq_cli.display.tables import findings_table, ranks_rows, run_summary
from gptq_cli.results.kept import GATES, KeptDense, OwnSettings
from gptq_cli.results.run import ExpertsReport, RankReport, TextShare
from tests.display.events import DENSE, OFFLOAD, REFUSED, report
from tests.golden import check_golden


def rendered(table: RenderableType, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, _environ={})
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    text = "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"
    assert max(map(len, text.splitlines())) <= width
    return text


@pytest.mark.parametrize("width", [80, 160])
def test_the_summary_of_a_run(width: int) -> None:
    check_golden(f"tables/run_{width}.txt", rendered(run_summary(report()), width))


def test_a_summary_names_every_fallback_and_the_next_command() -> None:
    text = rendered(run_summary(report()), 160)
    assert "1 of 21 linears fell back to round-to-nearest: model.layers.1.mlp.down_proj" in text
    assert text.endswith(" next: gptq load smol-w4g64\n")
    clean = replace(report(), fallbacks=0, warnings=(), blocks=report().blocks[:1])
    assert "FALLBACK" not in rendered(run_summary(clean))


def test_a_mean_loss_of_zero_is_compared_with_nothing() -> None:
    linears = tuple(replace(x, loss=0.0, rtn_loss=0.0) for x in report().blocks[0].linears)
    blocks = (replace(report().blocks[0], linears=linears),)
    text = rendered(run_summary(replace(report(), blocks=blocks)), 160)
    assert " mean loss    0.0000, round-to-nearest 0.0000\n" in text


def test_a_summary_says_what_each_source_of_text_gave() -> None:
    shares = (
        TextShare(source="chat.jsonl:messages", weight=3.0, samples=96, tokens=49152),
        TextShare(source="pydoc", weight=1.0, samples=32, tokens=16384),
    )
    text = rendered(run_summary(replace(report(), calibration_texts=shares)), 160)
    assert "calibration  2 sources, 128 x 512 = 65,536 tokens, seed 0\n" in text
    assert " chat.jsonl:messages, 96 x 512 = 49,152 tokens (75%)\n" in text
    assert " pydoc, 32 x 512 = 16,384 tokens (25%)\n" in text


def test_a_summary_says_in_one_line_how_many_tokens_the_experts_saw() -> None:
    names = tuple(f"model.layers.1.mlp.experts.{i}" for i in range(6))
    found = ExpertsReport(
        experts=128, least_tokens=0, median_tokens=1900, most_tokens=20412, few=31, unreached=names
    )
    text = rendered(run_summary(replace(report(), experts=found)), 320)
    (line,) = [line.strip() for line in text.splitlines() if line.startswith(" experts ")]
    assert " ".join(line.split()) == (
        "experts 128, which saw 0 to 20,412 calibration tokens (median 1,900); 31 saw fewer than they have"
        f" columns; no token reached 6: {', '.join(names[:4])} and 2 more"
    )
    enough = replace(found, least_tokens=900, few=0, unreached=())
    assert "calibration tokens (median 1,900)\n" in rendered(
        run_summary(replace(report(), experts=enough)), 320
    )
    assert "experts" not in rendered(run_summary(report()))


def test_the_next_command_can_be_pasted_whatever_the_path() -> None:
    assert "gptq load 'my model'" in rendered(run_summary(replace(report(), out="my model")))


def test_a_summary_without_blocks_or_predictions() -> None:
    bare = replace(
        report(), blocks=(), predicted_peak_bytes=(), size_after_bytes=0, revision=None, dense_modules=()
    )
    text = rendered(run_summary(bare))
    assert "worst linears" not in text
    assert "predicted" not in text


def test_findings_come_errors_first_with_their_remedies() -> None:
    text = rendered(findings_table([DENSE, OFFLOAD, REFUSED]))
    check_golden("tables/findings_80.txt", text)
    assert text.index("error") < text.index("warning") < text.index("note")


def test_a_long_list_of_modules_is_cut_and_says_so() -> None:
    many = replace(OFFLOAD, modules=tuple(f"h.{i}" for i in range(40)))
    assert "40 modules: h.0, h.1, h.2, h.3 and 36 more" in rendered(findings_table([many]), 160)


def test_settings_by_module_and_what_stays_dense_are_one_line_per_pattern() -> None:
    own = OwnSettings(name="model.layers.*.mlp.down_proj", bits=8, group_size=-1, sym=False, linears=3)
    kept = KeptDense(name="model.layers.*.router", reason=GATES, linears=1, weights=8)
    text = rendered(run_summary(replace(report(), own_settings=(own,), kept_dense=(kept,))), 160)
    assert (
        " by module    model.layers.*.mlp.down_proj: 8 bits, one group per row, asymmetric (3 linears)"
        in text
    )
    assert " stays dense  model.layers.*.router: its output only gates\n" in text
    assert "by module" not in rendered(run_summary(report()))


def test_a_quantized_head_is_among_the_linears() -> None:
    head = replace(report().linears[0], name="lm_head", out_features=49152, seconds=99.0)
    assert "\n lm_head  " in rendered(run_summary(replace(report(), head=head)))


def test_several_ranks_are_listed_and_the_one_that_waited_least_is_the_slowest() -> None:
    ranks = tuple(
        RankReport(rank=n, host="a", device=f"cuda:{n}", sent_bytes=3 << 20, waited_seconds=waited)
        for n, waited in enumerate((40.0, 2.0))
    )
    assert ranks_rows(replace(report(), ranks=ranks)) == [
        ("rank 0 on a", "cuda:0, waited 40.0 s, sent 3.00 MiB"),
        ("rank 1 on a", "cuda:1, waited 2.0 s, sent 3.00 MiB, the slowest"),
    ]
    assert ranks_rows(report()) == []
