"""Signals are deferred to the end of a block."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from gptq_cli.checkpoint.held_signals import held_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_waits(number: signal.Signals) -> None:
    heard: list[int] = []
    before = signal.signal(number, lambda n, _: heard.append(n))
    try:
        with held_signals() as check:
            check()
            signal.raise_signal(number)
            signal.raise_signal(number)
            assert heard == []
            with pytest.raises(KeyboardInterrupt):
                check()
        assert heard == [number]
    finally:
        signal.signal(number, before)


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with held_signals() as check:
            signal.raise_signal(signal.SIGHUP)
            check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_interrupts_after_the_block() -> None:
    done = []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "another test left its own"
    with pytest.raises(KeyboardInterrupt), held_signals():
        signal.raise_signal(signal.SIGINT)
        done.append("block")
    assert done == ["block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interruption_while_handlers_are_set_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = signal.signal

    def interrupted(number: int, handler: Any) -> Any:
        if number == signal.SIGTERM:
            raise KeyboardInterrupt
        return usual(number, handler)

    monkeypatch.setattr(signal, "signal", interrupted)
    with pytest.raises(KeyboardInterrupt), held_signals():
        pytest.fail("it was interrupted before")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
