"""Heartbeats, with a store in memory and beats of a hundredth of a second."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore

from gptq_cli.errors import ConfigError, GptqError, NonFinite, QualityGateFailed, RankLost
from gptq_cli.ranks.watch import START, Limits, Watch, Word

LIMITS = Limits(beat_seconds=0.01, silent_seconds=0.2, stuck_seconds=0.1, settle_seconds=0.3)
ME = Word(0, "here", os.getpid())
OTHER = Word(1, "there", 4711, where="model.layers.3")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Ranks:
    """Rank 0 under test, and a store into which the test puts what rank 1 says."""

    def __init__(self, own: Word = ME, limits: Limits = LIMITS) -> None:
        self.store: Any = HashStore()
        self.watch = Watch(self.store, own, 2, limits)

    def say(self, word: Word) -> None:
        self.store.set(f"rank/{word.rank}", json.dumps(asdict(word)))

    def error(self) -> Exception:
        until(lambda: self.watch.lost)
        with pytest.raises(GptqError) as caught:
            self.watch.check()
        return caught.value


def test_a_rank_that_beats_is_well() -> None:
    ranks = Ranks(limits=replace(LIMITS, silent_seconds=1000.0))
    with ranks.watch:
        for beat in range(50):
            ranks.say(replace(OTHER, beat=beat))
            time.sleep(0.01)
        ranks.watch.check()


def test_a_silent_rank_is_named_with_its_machine_and_the_last_block() -> None:
    ranks = Ranks()
    with ranks.watch:
        ranks.watch.at("model.layers.3")
        ranks.say(OTHER)
        error = ranks.error()
    assert isinstance(error, RankLost)
    assert "rank 1 (process 4711 on there)" in error.message
    assert "at model.layers.3" in error.message
    assert json.loads(ranks.store.get("over"))[1] == error.message, "the others are told"


def test_a_process_of_this_machine_that_ended_is_noticed_at_once() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    ranks = Ranks(limits=replace(LIMITS, silent_seconds=1000.0))
    with ranks.watch:
        ranks.say(Word(1, ME.host, ended.pid))
        assert f"rank 1 (process {ended.pid} on here) ended" in str(ranks.error())


def test_a_rank_that_lives_and_lets_the_others_wait_is_stuck() -> None:
    ranks = Ranks(limits=replace(LIMITS, silent_seconds=1000.0))
    with ranks.watch, ranks.watch.waiting():
        ranks.say(OTHER)
        assert "is stuck" in str(ranks.error())


def test_before_the_first_block_the_others_wait_as_long_as_it_takes() -> None:
    ranks = Ranks(limits=replace(LIMITS, silent_seconds=1000.0))
    with ranks.watch, ranks.watch.waiting():
        ranks.say(replace(OTHER, where=START))
        time.sleep(0.3)
        ranks.watch.check()


def test_a_rank_that_waits_as_well_is_not_stuck() -> None:
    ranks = Ranks(limits=replace(LIMITS, silent_seconds=1000.0))
    with ranks.watch, ranks.watch.waiting():
        ranks.say(replace(OTHER, waits=1))
        time.sleep(0.3)
        ranks.watch.check()


def below(kind: type[GptqError]) -> list[type[GptqError]]:
    return [deep for child in kind.__subclasses__() for deep in (child, *below(child))]


@pytest.mark.parametrize("kind", [ConfigError, *below(QualityGateFailed)])
def test_the_error_of_another_rank_is_of_its_kind_and_names_it(kind: type[GptqError]) -> None:
    ranks = Ranks()
    with ranks.watch:
        ranks.say(replace(OTHER, state="failed", error=(kind.__name__, "it is wrong", "mend it")))
        error = ranks.error()
    assert type(error) is kind
    assert str(error) == "rank 1 (process 4711 on there): it is wrong"


def test_an_error_of_no_known_kind_is_a_lost_rank() -> None:
    ranks = Ranks()
    with ranks.watch:
        ranks.say(replace(OTHER, state="failed", error=("KeyError", "KeyError: 3", "")))
        assert isinstance(ranks.error(), RankLost)


def test_a_rank_that_is_done_may_go() -> None:
    ranks = Ranks()
    with ranks.watch:
        ranks.say(replace(OTHER, state="left"))
        time.sleep(0.4)
        ranks.watch.check()


def test_the_others_hear_from_the_first_who_is_lost() -> None:
    ranks = Ranks(own=Word(2, "elsewhere", os.getpid()))
    with ranks.watch:
        ranks.say(replace(OTHER, rank=0))
        ranks.store.set("over", json.dumps(["RankLost", "rank 1 ended", "", 1]))
        error = ranks.error()
        assert isinstance(error, RankLost)
        assert (str(error), error.rank) == ("rank 1 ended", 1)


def test_the_last_word_says_why() -> None:
    ranks = Ranks()
    with ranks.watch:
        ranks.watch.leave("failed", NonFinite("NaN", hint="run in float32"))
    said = json.loads(ranks.store.get("rank/0"))
    assert (said["state"], said["error"]) == ("failed", ["NonFinite", "NaN", "run in float32"])


def test_who_is_to_blame_when_a_connection_breaks() -> None:
    ranks = Ranks(limits=replace(LIMITS, silent_seconds=1000.0))
    with ranks.watch:
        ranks.say(OTHER)
        time.sleep(0.1)
        error = ranks.watch.blamed()
    assert error is not None
    assert "rank 1 (process 4711 on there) ended" in error.message


def test_nobody_is_to_blame_when_all_were_interrupted() -> None:
    ranks = Ranks(limits=replace(LIMITS, silent_seconds=1000.0, settle_seconds=30.0))
    with ranks.watch:
        ranks.say(replace(OTHER, state="interrupted"))
        time.sleep(0.05)
        assert ranks.watch.blamed() is None
