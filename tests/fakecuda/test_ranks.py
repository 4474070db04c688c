"""Two ranks, each with make-believe devices of its own: what one process on the CPU writes, they write.

What travels between them goes over gloo, through main memory: nccl is a library of its own, which asks the
driver for memory that cards share, and there is no driver. What a run over nccl adds to this is that tensors
stay on the device (`Ranks`, `device`); the operations and their order are the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptq_cli.cli.app import main
from tests.e2e import test_ranks as ranks
from tests.e2e.test_ranks import Ended, Line, Started, by_itself, command, different
from tests.fakecuda.devices import installed

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("devices")]
KINDS = ("llama", "qwen3_moe")
DEVICE_BYTES = 4 << 30
if installed() is not None:  # elsewhere the ranks of tests/e2e/test_ranks.py would see simulated cards
    ranks.CONTEXT.set_forkserver_preload(["tests.fakecuda.plugin", *ranks.PRELOADED])


def with_one_card(*words: Any) -> None:
    """A rank that sees one device, as where a scheduler hides all others from it."""
    found = installed()
    assert found is not None
    found.resize([DEVICE_BYTES])
    ranks.run_rank(*words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path], text: Path) -> Path:
    """The models, the text, and the checkpoints that one process makes on the CPU."""
    made = tmp_path_factory.mktemp("ranks")
    (made / "text.txt").symlink_to(text)
    for kind in KINDS:
        (made / kind).symlink_to(tiny(kind))
    with pytest.MonkeyPatch.context() as patch:
        by_itself(patch)
        for kind in KINDS:
            assert main([*command(made, kind, f"cpu-{kind}"), "--device-map", "cpu", "--quiet"]) == 0
    return made


@pytest.fixture(scope="module")
def by_two(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Both see both devices."""
    lines = [Line(command(folder, kind, f"two-{kind}", "--progress", "plain")) for kind in KINDS]
    return Started(lines, 2, tmp_path_factory.mktemp("two")).ended()


@pytest.fixture(scope="module")
def with_one_each(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Each sees one device: first both the same, then each its own."""
    words = {n: command(folder, "llama", n, "--progress", "plain") for n in ("shared", "own")}
    lines = [
        Line(words["shared"], environ={rank: {"CUDA_VISIBLE_DEVICES": "1"} for rank in (0, 1)}),
        Line(words["own"], environ={rank: {"CUDA_VISIBLE_DEVICES": str(rank)} for rank in (0, 1)}),
    ]
    return Started(lines, 2, tmp_path_factory.mktemp("one"), with_one_card).ended()


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_on_devices_of_their_own_write_what_the_cpu_writes(
    kind: str, folder: Path, by_two: Ended
) -> None:
    assert by_two.codes == [0, 0], by_two.err
    assert different(folder, f"cpu-{kind}", f"two-{kind}") == []
    report = json.loads((folder / f"two-{kind}" / "report.json").read_text(encoding="utf-8"))
    assert [rank["device"] for rank in report["ranks"]] == ["cuda:0", "cuda:1"]
    assert report["devices"] == ["cuda:0"]
    peaks = dict(report["measured_peak_bytes"])
    assert 0 < peaks["cuda:0"] <= 1.2 * dict(report["predicted_peak_bytes"])["cuda:0"]
    assert "rank 1 on " in by_two.err[0]
    assert ": cuda:1 allocated " in by_two.err[0], "the devices of all ranks are shown while it runs"


def test_two_ranks_and_one_device_is_an_error_before_the_work(folder: Path, with_one_each: Ended) -> None:
    assert " has 1 accelerator for 2 processes; each needs one of its own" in with_one_each.err[0]
    assert "--nproc-per-node 1, or --device-map cpu" in with_one_each.err[0]
    assert not (folder / "shared").exists()


def test_ranks_that_each_see_their_own_device_alone_work(folder: Path, with_one_each: Ended) -> None:
    assert with_one_each.codes == [0, 0], with_one_each.err
    assert different(folder, "cpu-llama", "own") == []
    report = json.loads((folder / "own" / "report.json").read_text(encoding="utf-8"))
    assert [rank["device"] for rank in report["ranks"]] == ["cuda:0", "cuda:0"]
