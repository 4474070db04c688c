from dataclasses import replace

import pytest

from gptq_cli.placement.device import CPU, Device
from gptq_cli.placement.placement import DeviceBudget
from gptq_cli.ranks.joining import Joined, Member, wrong_launch
from gptq_cli.ranks.launch import Launch
from gptq_cli.ranks.team import ALONE

FIRST = Member(
    rank=0,
    host="a",
    pid=1,
    local_rank=0,
    local_size=2,
    asked=("torchrun", "quantize", "M", "--out", "q"),
    versions=(("torch", "2.13.0"),),
    accelerators=2,
    device="cuda:0",
    card="0",
    device_bytes=(80, 70),
    host_bytes=(400, 300),
)
SECOND = replace(FIRST, rank=1, pid=2, local_rank=1, device="cuda:1", card="1", device_bytes=(80, 60))


def test_ranks_that_can_work_together() -> None:
    assert wrong_launch([FIRST, SECOND], {1: 0.4}) is None
    assert wrong_launch([FIRST, replace(SECOND, host="b", card="0")], {}) is None
    each_its_own = replace(FIRST, accelerators=1), replace(SECOND, accelerators=1, device="cuda:0")
    assert wrong_launch(each_its_own, {}) is None, "a scheduler lets each process see its own alone"


@pytest.mark.parametrize(
    ("second", "gap", "said"),
    [
        (
            replace(SECOND, asked=("torchrun", "quantize", "M", "--out", "q1")),
            0.0,
            "'q1' where rank 0 was with 'q'",
        ),
        (replace(SECOND, asked=SECOND.asked[:-1]), 0.0, "with nothing where rank 0 was with 'q'"),
        (
            replace(SECOND, versions=(("torch", "2.12.1"),)),
            0.0,
            "rank 1 on a has torch 2.12.1, rank 0 has 2.13.0",
        ),
        (replace(SECOND, accelerators=1, card="0"), 0.0, "a has 1 accelerator for 2 processes"),
        (replace(SECOND, card="0"), 0.0, "rank 1 on a would work on the same accelerator (0) as rank 0"),
        (
            replace(SECOND, device="cpu", card="", accelerators=0),
            0.0,
            "rank 1 on a would work on cpu, rank 0 on cuda",
        ),
        (SECOND, -400.0, "the clock of rank 1 on a is 7 min behind that of rank 0"),
    ],
)
def test_ranks_that_cannot(second: Member, gap: float, said: str) -> None:
    error = wrong_launch([FIRST, second], {1: gap})
    assert error is not None
    assert said in error.message
    assert error.hint


def test_every_rank_can_count_on_what_the_smallest_has() -> None:
    launch = Launch(rank=0, size=2, local_rank=0, local_size=2, host="a", port=1)
    other = replace(SECOND, host_bytes=(200, 100))
    joined = Joined(launch, ALONE, (FIRST, other))
    assert joined.budgets == (DeviceBudget(Device("cuda", 0), 80, 60), DeviceBudget(CPU, 200, 100))
