"""Whose sums the shared first token of the samples counts more in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_cli.engine import block as block_module
from gptq_cli.engine import capture as capture_module
from gptq_cli.engine.capture import samples_of
from gptq_cli.engine.stages import Stage
from gptq_cli.gptq.moments import StageMoments
from gptq_cli.ranks.team import ALONE
from tests.conftest import TinyFactory
from tests.e2e.commands import FAST, gptq, write_text


@pytest.mark.parametrize(("other", "same"), [(7, True), (8, False)])
def test_it_is_seen_in_all_samples(other: int, same: bool) -> None:
    ids = torch.tensor([[7, 1], [7, 2], [other, 3]])
    assert samples_of(ALONE, ids, 2, 2).one_start is same


@pytest.mark.parametrize("same", [True, False])
def test_it_counts_more_where_no_token_is_routed(
    same: bool, tiny: TinyFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, tuple[bool, bool]] = {}
    made = block_module._moments

    def noted(context: Any, stage: Stage, *words: Any, **options: Any) -> StageMoments:
        moments = made(context, stage, *words, **options)
        seen[stage.leader] = (stage.once, moments._one_start)
        return moments

    monkeypatch.setattr(block_module, "_moments", noted)
    monkeypatch.setattr(capture_module, "shared_start", lambda ids: same)
    text = write_text(tmp_path / "text.txt")
    ran = gptq("quantize", tiny("qwen3_moe"), "--out", tmp_path / "q", "--calibration", text, *FAST)
    assert ran.code == 0, ran.stderr
    assert {once for once, _ in seen.values()} == {True, False}
    assert all(one_start is (once and same) for once, one_start in seen.values())
