"""Checks that hold for every HTML page, and reports that fill each part of one."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

from gptq_cli.results.load import LoadReport, TaskScore
from gptq_cli.results.run import BlockReport, ExpertsReport, LinearReport, RunReport
from tests.display.events import DENSE, OFFLOAD, full_load_report, report

VOID = {"meta", "link", "br", "img", "hr", "input", "wbr"}


class Tags(HTMLParser):
    """Checks that tags nest, and collects what is linked and named."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        held = dict(attrs)
        if tag == "a":
            self.links.append(held.get("href") or "")
        if held.get("id"):
            self.ids.append(held["id"] or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()


def check_page(page: str) -> Tags:
    """Well-formed, self-contained, one heading of the first order, links that lead somewhere."""
    tags = Tags(page)
    assert tags.open == []
    assert tags.seen.count("h1") == 1
    assert not re.search(r"\ssrc\s*=|url\(|@import|<script|https?://", page)
    assert len(set(tags.ids)) == len(tags.ids)
    assert {link.removeprefix("#") for link in tags.links} <= set(tags.ids)
    assert all(link.startswith("#") for link in tags.links)
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ET.fromstring(svg)
    return tags


def scores() -> tuple[TaskScore, ...]:
    """Of two tasks; only one was measured of the dense model, too."""
    one = TaskScore(
        task="arc_easy",
        metric="acc_norm",
        value=0.4213,
        stderr=0.0101,
        higher_is_better=True,
        samples=2376,
        shots=0,
        dense=0.4312,
    )
    other = replace(one, task="a_group", metric="acc", stderr=None, samples=None, shots=None, dense=None)
    return one, other


def measured_load() -> LoadReport:
    """Everything that `gptq load` can measure."""
    return replace(full_load_report(), tasks=scores())


def full_report(blocks: int = 3) -> RunReport:
    """A run with findings, an estimate, and a proof."""
    made = report(blocks)
    return replace(
        made,
        findings=(OFFLOAD, DENSE),
        predicted_seconds=40.0,
        predicted_block_seconds=tuple((block.name, 6.0) for block in made.blocks),
        proof=measured_load(),
    )


def expert_report(experts: int = 8, layers: int = 2) -> RunReport:
    """A run of a model with experts; one of each layer was never reached, another saw too few tokens."""
    made = full_report(layers)
    blocks = tuple(_with_experts(block, experts) for block in made.blocks)
    linears = [linear for block in blocks for linear in block.linears]
    return replace(made, blocks=blocks, experts=ExpertsReport.of(linears))


def _with_experts(block: BlockReport, experts: int) -> BlockReport:
    first = block.linears[0]

    def expert(number: int, name: str) -> LinearReport:
        tokens = (0, 12, 4000)[min(number, 2)] + number
        return replace(
            first,
            name=f"{block.name}.mlp.experts.{number}.{name}",
            tokens=tokens if number else 0,
            routed=True,
        )

    own = (expert(number, name) for number in range(experts) for name in ("gate_proj", "down_proj"))
    return replace(block, linears=(*block.linears[:4], *own))
