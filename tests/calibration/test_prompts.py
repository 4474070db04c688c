"""The page of requests: many kinds and languages, split once and for all."""

from __future__ import annotations

from gptq_cli.calibration.prompts import PAGE, read_prompts


def test_every_line_is_in_one_part() -> None:
    used, held_out = read_prompts(held_out=False), read_prompts(held_out=True)
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith(("# ", "["))]
    for one, other in ((used.requests, held_out.requests), (used.openings, held_out.openings)):
        assert not set(one) & set(other)
        assert 3 * len(other) < len(one)
        assert len(set(one)) == len(one)
    everything = (*used.requests, *used.openings, *held_out.requests, *held_out.openings)
    assert sorted(everything) == sorted(lines)


def test_both_parts_are_of_many_kinds() -> None:
    for held_out in (False, True):
        requests = read_prompts(held_out=held_out).requests
        assert any("Python" in text or "`" in text for text in requests)
        assert sum(not text.isascii() for text in requests) >= 3


def test_the_split_does_not_change_unseen() -> None:
    first = "Describe how a bill becomes a law in a parliamentary democracy."
    assert read_prompts(held_out=True).requests[0] == first
