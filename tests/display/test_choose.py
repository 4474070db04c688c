"""Which display, and when."""

import io
from typing import cast

import pytest

from gptq_cli.display.choose import Progress, choose, is_live
from gptq_cli.display.jsonl import JsonlDisplay
from gptq_cli.display.plain import PlainDisplay
from gptq_cli.display.rich import RichDisplay
from gptq_cli.events import FindingRaised, TextGenerated, Warned, ignore, warning_text
from tests.display.events import DENSE, OFFLOAD, sample_run


class Tty(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environ", "live"),
    [
        (Tty(), {"TERM": "xterm-256color"}, True),
        (Tty(), {"TERM": "xterm", "CI": "false"}, True),
        (Tty(), {"TERM": "dumb"}, False),
        (Tty(), {"TERM": "xterm", "CI": "true"}, False),
        (io.StringIO(), {"TERM": "xterm"}, False),
    ],
)
def test_auto_is_live_at_a_terminal_only(stream: io.StringIO, environ: dict[str, str], live: bool) -> None:
    assert is_live(stream, environ) is live
    display = choose("auto", quiet=False, stream=stream, environ=environ)
    assert isinstance(display, RichDisplay if live else PlainDisplay)


def test_a_choice_is_obeyed_wherever_it_goes() -> None:
    assert isinstance(choose("rich", quiet=False, stream=io.StringIO(), environ={"CI": "1"}), RichDisplay)
    assert isinstance(choose("plain", quiet=False, stream=Tty(), environ={}), PlainDisplay)
    assert isinstance(choose("jsonl", quiet=False, stream=Tty(), environ={}), JsonlDisplay)


@pytest.mark.parametrize("progress", ["auto", "rich", "plain", "jsonl", "none"])
def test_quiet_silences_every_display(progress: str) -> None:
    stream = Tty()
    with choose(progress, quiet=True, stream=stream, environ={}) as observer:  # type: ignore[arg-type]
        assert observer is ignore
        observer(Warned("x"))
    assert stream.getvalue() == ""


def test_a_live_display_beside_text_makes_way() -> None:
    display = choose("rich", quiet=False, stream=Tty(), environ={}, beside_text=True)
    assert isinstance(display, RichDisplay)
    with display as observer:
        observer(TextGenerated("x", 1))
        assert not display._live.is_started


def test_none_shows_warnings_alone() -> None:
    stream = Tty()
    with choose("none", quiet=False, stream=stream, environ={}) as observer:
        for _, event in sample_run():
            observer(event)
        observer(FindingRaised(OFFLOAD))
        observer(FindingRaised(DENSE))
    told = [event for _, event in sample_run() if warning_text(event) is not None]
    warned = [line for line in stream.getvalue().splitlines() if not line.startswith("  hint: ")]
    assert len(warned) == len(told) + 1
    assert all(line.startswith("warning") for line in warned)
    assert "left-dense" not in stream.getvalue()


def test_quiet_is_quiet() -> None:
    for progress in ("auto", "rich", "plain", "jsonl", "none"):
        with choose(cast(Progress, progress), quiet=True, stream=Tty(), environ={}) as observer:
            assert observer is ignore
