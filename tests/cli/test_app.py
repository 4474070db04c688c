"""main(): exit codes, and what goes to which stream."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gptq_cli import __version__, errors
from gptq_cli.cli.app import main
from gptq_cli.events import FindingRaised, Observer, PhaseStarted, RunFinished, Warned
from gptq_cli.findings import PreflightReport
from tests.cli.conftest import FakeJobs, Run
from tests.display.events import DENSE, OFFLOAD, REFUSED, report

QUANTIZE = ("quantize", "MODEL", "--out", "OUT")
REFUSAL = PreflightReport((DENSE, REFUSED, OFFLOAD))


def raising(error: BaseException) -> Callable[[Observer], None]:
    """An action that fails with `error`."""

    def fail(_: Observer) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.GptqError("m", hint="h"), 1),
        (errors.UsageError("m", hint="h"), 2),
        (errors.ConfigError("m", hint="h"), 2),
        (errors.DestinationBusy("m", hint="h"), 2),
        (errors.DeviceMapError("m", hint="h"), 2),
        (errors.ModelError("m", hint="h"), 2),
        (errors.SourceChanged("m", hint="h"), 1),
        (errors.CalibrationError("m", hint="h"), 2),
        (errors.CheckpointError("m", hint="h"), 2),
        (errors.OutOfDeviceMemory("m", hint="h"), 4),
        (errors.RankLost("m", hint="h"), 1),
        (errors.QualityGateFailed("m", hint="h"), 5),
        (errors.NonFinite("m", hint="h"), 5),
        (errors.WeightTooLarge("m", hint="h"), 5),
        (errors.NotPositiveDefinite("m", hint="h"), 5),
        (errors.LinearLost("m", hint="h"), 5),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_every_error_has_its_exit_code(jobs: FakeJobs, run: Run, error: errors.GptqError, code: int) -> None:
    jobs.action = raising(error)
    outcome = run(*QUANTIZE)
    assert (outcome.code, outcome.out) == (code, "")
    assert outcome.err == "error: m\n  hint: h\n"
    outcome = run(*QUANTIZE, "--json")
    assert outcome.code == code
    named = {"type": type(error).__name__, "message": "m", "hint": "h"}
    expected = {**named, "exit_code": code, "findings": None}
    assert json.loads(outcome.out) == {"schema_version": 1, "error": expected}


def test_all_error_classes_are_tested_above() -> None:
    def below(kind: type[errors.GptqError]) -> set[type[errors.GptqError]]:
        return {kind} | {deep for child in kind.__subclasses__() for deep in below(child)}

    assert {kind.exit_code for kind in below(errors.GptqError)} == {1, 2, 3, 4, 5}
    assert len([kind for kind in below(errors.GptqError) if kind.__module__ == errors.__name__]) == 18


def test_a_refusal_shows_all_findings_at_once(jobs: FakeJobs, run: Run) -> None:
    jobs.action = raising(errors.PreflightRefused(REFUSAL))
    outcome = run(*QUANTIZE)
    assert (outcome.code, outcome.out) == (3, "")
    for finding in REFUSAL.findings:
        assert finding.rule in outcome.err
    assert (
        outcome.err.index("disk-offload") < outcome.err.index("cpu-offload") < outcome.err.index("left-dense")
    )
    assert outcome.err.endswith("error: refused by preflight: 1 error\n")


def test_disk_is_a_refusal_like_any_other(jobs: FakeJobs, run: Run) -> None:
    jobs.action = raising(errors.DiskOffloadRefused(REFUSAL))
    outcome = run(*QUANTIZE)
    assert outcome.code == 3
    assert "cpu-offload" in outcome.err
    assert outcome.err.endswith("error: disk offload is not supported with GPTQ quantization\n")


def test_findings_that_a_display_has_shown_are_not_repeated(jobs: FakeJobs, run: Run) -> None:
    def announce_and_refuse(observer: Observer) -> None:
        for finding in REFUSAL.findings:
            observer(FindingRaised(finding))
        raise errors.PreflightRefused(REFUSAL)

    jobs.action = announce_and_refuse
    assert run(*QUANTIZE, "--progress", "plain").err.count("[disk-offload]") == 1
    assert run(*QUANTIZE, "--progress", "plain").err.count("disk-offload") == 1
    quiet = run(*QUANTIZE, "--quiet")
    assert quiet.err.count("disk-offload") == 1
    assert "cpu-offload" not in quiet.err, "errors alone"


def test_a_refusal_as_json_holds_the_findings(jobs: FakeJobs, run: Run) -> None:
    jobs.action = raising(errors.PreflightRefused(REFUSAL))
    outcome = run(*QUANTIZE, "--json")
    error = json.loads(outcome.out)["error"]
    assert (outcome.code, error["type"]) == (3, "PreflightRefused")
    assert [finding["rule"] for finding in error["findings"]] == [
        "disk-offload",
        "cpu-offload",
        "left-dense",
    ]


def test_a_defect_keeps_its_traceback(jobs: FakeJobs, run: Run) -> None:
    jobs.action = raising(KeyError("lost"))
    outcome = run(*QUANTIZE)
    assert (outcome.code, outcome.out) == (1, "")
    assert "Traceback (most recent call last)" in outcome.err
    assert "in fail\n" in outcome.err
    assert "error: unexpected KeyError: 'lost'" in outcome.err
    body = json.loads(run(*QUANTIZE, "--json").out)["error"]
    assert (body["type"], body["exit_code"]) == ("KeyError", 1)


def test_a_lost_connection_is_a_defect_and_no_closed_pipe(jobs: FakeJobs, run: Run) -> None:
    jobs.action = raising(OSError(28, "No space left on device"))
    outcome = run(*QUANTIZE)
    assert outcome.code == 1
    assert "No space left on device" in outcome.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_interrupts(jobs: FakeJobs, run: Run, number: signal.Signals) -> None:
    cleaned = []

    def killed(_: Observer) -> None:
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            cleaned.append(True)

    jobs.action = killed
    before = signal.getsignal(number)
    outcome = run(*QUANTIZE)
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "interrupted\n")
    assert cleaned == [True]
    assert signal.getsignal(number) == before
    error = json.loads(run(*QUANTIZE, "--json").out)["error"]
    said = {"type": "Interrupted", "message": "interrupted", "hint": None}
    assert error == {**said, "exit_code": 130, "findings": None}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_after_the_result_is_in_place_interrupts_nothing(
    jobs: FakeJobs, run: Run, number: signal.Signals
) -> None:
    def action(observer: Observer) -> None:
        observer(RunFinished(report()))
        os.kill(os.getpid(), number)

    jobs.action = action
    outcome = run("quantize", "M", "--out", "O", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["model"]


def test_nohup_is_respected(jobs: FakeJobs, run: Run) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        jobs.action = lambda _: os.kill(os.getpid(), signal.SIGHUP)
        assert run(*QUANTIZE, "--quiet").code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("argv", "message", "hint"),
    [
        (("quantize",), "missing argument", "gptq quantize --help"),
        (
            ("quantize", "M", "--bitz", "4"),
            "no such option: --bitz",
            "did you mean --bits? gptq quantize --help lists all",
        ),
        (
            ("quantize", "M", "--bits", "four"),
            "--bits is 'four'; allowed: a whole number",
            "gptq quantize --help",
        ),
        (
            ("quantize", "M", "--dtype", "int8"),
            "--dtype is 'int8'; allowed: auto, float16",
            "gptq quantize --help",
        ),
        (("quantise", "M"), "no such command: quantise", "did you mean gptq quantize?"),
        (("load", "A", "B"), "unexpected extra argument", "gptq load --help"),
    ],
)
def test_usage_errors_exit_2(
    jobs: FakeJobs, run: Run, argv: tuple[str, ...], message: str, hint: str
) -> None:
    outcome = run(*argv)
    assert (outcome.code, outcome.out, jobs.called) == (2, "", "")
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    assert f"  hint: {hint}\n" in outcome.err
    outcome = run(*argv, "--json")
    error = json.loads(outcome.out)["error"]
    assert (outcome.code, error["type"], error["exit_code"]) == (2, "UsageError", 2)


def test_a_usage_error_from_the_environment_names_the_variable(
    jobs: FakeJobs, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTQ_BITS", "four")
    outcome = run(*QUANTIZE)
    assert outcome.code == 2
    assert "(GPTQ_BITS is 'four' in the environment)" in outcome.err


def test_no_arguments_show_the_help_page(run: Run) -> None:
    outcome = run()
    assert outcome.code == 2
    assert "Usage: gptq" in outcome.out + outcome.err


def test_version(run: Run) -> None:
    outcome = run("--version")
    assert outcome.code == 0
    assert outcome.out.startswith(f"gptq {__version__} (python 3.")
    assert outcome.out.count("\n") == 1


def test_stdout_is_the_result_and_stderr_the_talk(jobs: FakeJobs, run: Run) -> None:
    def chatter(observer: Observer) -> None:
        observer(PhaseStarted("load"))
        print("a library prints")

    jobs.action = chatter
    outcome = run(*QUANTIZE)
    assert outcome.code == 0
    assert outcome.out.startswith(" smol-w4g64 is ready")
    assert "a library prints" not in outcome.out
    assert outcome.err.splitlines() == ["[0:00:00] load: started", "a library prints"]
    outcome = run(*QUANTIZE, "--json")
    assert json.loads(outcome.out)["out"] == "smol-w4g64"


def test_quiet_is_silent_but_for_errors(jobs: FakeJobs, run: Run) -> None:
    def chatter(observer: Observer) -> None:
        observer(Warned("x"))
        print("a library prints")
        print("and complains", file=sys.stderr)

    jobs.action = chatter
    assert run(*QUANTIZE, "--quiet").err == ""
    jobs.action = raising(errors.ConfigError("m"))
    assert run(*QUANTIZE, "--quiet").err == "error: m\n"


def test_a_json_lines_stream_is_json_whatever_libraries_print(jobs: FakeJobs, run: Run) -> None:
    def chatter(observer: Observer) -> None:
        observer(PhaseStarted("load"))
        print("to stdout")
        sys.stderr.write("half a ")
        sys.stderr.write("line\rand another\n")

    jobs.action = chatter
    outcome = run(*QUANTIZE, "--progress", "jsonl", "--json")
    lines = [json.loads(line) for line in outcome.err.splitlines()]
    assert [line["event"] for line in lines] == ["PhaseStarted", "Log", "Log", "Log"]
    assert [line["text"] for line in lines[1:]] == ["to stdout", "half a line", "and another"]
    json.loads(outcome.out)


@pytest.mark.parametrize(
    ("words", "variable"),
    [
        (("--bits", "x", "--progress", "jsonl"), None),
        (("--progress=jsonl", "--bits", "5"), None),
        (("--nope",), "jsonl"),
        (("--bits", "5"), "jsonl"),
    ],
)
def test_an_error_before_the_work_is_json_lines_too(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], variable: str | None
) -> None:
    if variable is not None:
        monkeypatch.setenv("GPTQ_PROGRESS", variable)
    outcome = run(*QUANTIZE, *words)
    assert outcome.code == 2
    *logs, failed = [json.loads(line) for line in outcome.err.splitlines()]
    assert logs[0]["text"].startswith("error: ")
    assert failed["event"] == "Failed"
    quiet = run(*QUANTIZE, *words, "--quiet")
    assert quiet.code == 2
    assert quiet.err.startswith("error: ")
    monkeypatch.setenv("GPTQ_QUIET", "1")
    assert run(*QUANTIZE, *words).err == quiet.err


def test_a_command_without_progress_does_not_follow_its_variable(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTQ_PROGRESS", "jsonl")
    assert run("report", "nosuch").err.startswith("error: no such directory")


@pytest.mark.parametrize("progress", ["none", "plain", "jsonl", "rich"])
def test_files_record_beside_every_display(jobs: FakeJobs, run: Run, tmp_path: Path, progress: str) -> None:
    def chatter(observer: Observer) -> None:
        observer(PhaseStarted("load"))
        observer(Warned("be warned"))
        print("a library prints")
        raise errors.ConfigError("m", hint="h")

    jobs.action = chatter
    log, events = tmp_path / "run.log", tmp_path / "run.jsonl"
    outcome = run(*QUANTIZE, "--progress", progress, "--log-file", str(log), "--events", str(events))
    assert (outcome.code, jobs.called) == (2, "quantize")
    words = [line.partition("] ")[2] for line in log.read_text().splitlines()]
    assert words == ["load: started", "warning: be warned", "a library prints", "error: m"]
    found = [json.loads(line) for line in events.read_text().splitlines()]
    assert [one["event"] for one in found] == ["PhaseStarted", "Warned", "Log", "Failed"]
    alone = run(*QUANTIZE, "--progress", progress)
    if progress == "plain":
        assert outcome.err == alone.err


def test_files_record_what_quiet_hides(jobs: FakeJobs, run: Run, tmp_path: Path) -> None:
    jobs.action = lambda observer: observer(Warned("be warned"))
    log = tmp_path / "run.log"
    assert run(*QUANTIZE, "--quiet", "--log-file", str(log)).err == ""
    assert "warning: be warned" in log.read_text()
    outcome = run(*QUANTIZE, "--events", str(tmp_path / "no" / "x"))
    assert outcome.code == 2
    assert outcome.err.startswith("error: events is ")


def test_json_may_come_from_the_environment(
    jobs: FakeJobs, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTQ_JSON", "1")
    jobs.action = raising(errors.ConfigError("m"))
    assert json.loads(run(*QUANTIZE).out)["error"]["message"] == "m"


def in_a_process(code: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    """Run Python code that may use FakeJobs, in a process of its own."""
    prelude = (
        "import sys, gptq_cli\n"
        "from tests.cli.conftest import FakeJobs\n"
        "from gptq_cli.cli.app import main\n"
        "fake = FakeJobs(); module = fake.module()\n"
        "sys.modules['gptq_cli.jobs'] = module; gptq_cli.jobs = module\n"
    )
    root = Path(__file__).resolve().parents[2]
    environ = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-c", prelude + code], env=environ, cwd=root, text=True, timeout=60, **kwargs
    )


def test_a_reader_of_stdout_that_went_away_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    done = in_a_process(
        "sys.exit(main(['quantize', 'M', '--out', 'O', '--quiet', '--json']))",
        stdout=write,
        stderr=subprocess.PIPE,
    )
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == ""


@pytest.mark.parametrize("words", [["rules"], ["load", "--help"], ["targets", "--json"]])
def test_what_only_tells_ends_the_same_way(words: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "gptq_cli", *words],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_reader_of_stderr_that_went_away_does_not_end_the_work() -> None:
    read, write = os.pipe()
    os.close(read)
    code = (
        "from tests.display.events import sample_run\n"
        "fake.action = lambda observer: [observer(event) for _, event in sample_run(1)]\n"
        "sys.exit(main(['quantize', 'M', '--out', 'O', '--json']))"
    )
    done = in_a_process(code, stdout=subprocess.PIPE, stderr=write)
    os.close(write)
    assert json.loads(done.stdout)["out"] == "smol-w4g64"
    assert done.returncode == 0


def test_a_terminal_of_another_encoding_kills_nothing() -> None:
    environ = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    root = Path(__file__).resolve().parents[2]
    code = "import sys; from gptq_cli.cli.app import main; sys.exit(main(['quantize', 'M', '--bits', '…']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environ,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_completion_knows_commands_and_options() -> None:
    root = Path(__file__).resolve().parents[2]

    def complete(words: str) -> list[str]:
        environ = {
            **os.environ,
            "_GPTQ_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
        }
        code = "from gptq_cli.cli.app import main; raise SystemExit(main([]))"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environ,
            cwd=root,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert complete("gptq in") == ["inspect-map"]
    assert complete("gptq quantize M --des") == ["--desc-act"]
    assert complete("gptq quantize M --dtype b") == ["bfloat16"]


def test_main_takes_the_words_of_the_process(jobs: FakeJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gptq", "load", "DIR", "--quiet"])
    assert main() == 0
    assert jobs.job.path == "DIR"


EVIL = "\x1b[31m\x9b2J\r\nerror: forged\u202e[red]"
SPELLED = "\\x1b[31m\\x9b2J\\r\\nerror: forged\\u202e[red]"


def test_an_error_is_one_line_whatever_is_in_it(jobs: FakeJobs, run: Run) -> None:
    jobs.action = raising(errors.ModelError(f"no {EVIL}", hint=f"try {EVIL}"))
    assert run(*QUANTIZE).err == f"error: no {SPELLED}\n  hint: try {SPELLED}\n"
    assert json.loads(run(*QUANTIZE, "--json").out)["error"]["message"] == f"no {EVIL}"
    refusal = PreflightReport((replace(REFUSED, message=EVIL, subject=EVIL, hint=EVIL),))
    jobs.action = raising(errors.PreflightRefused(refusal))
    outcome = run(*QUANTIZE)
    assert outcome.err.count(SPELLED) == 3
    assert outcome.err.count("\n") == 3
    jobs.action = raising(ValueError(EVIL))
    outcome = run(*QUANTIZE)
    assert "\x1b" not in outcome.err
    assert f"\nerror: unexpected ValueError: {SPELLED}\n" in outcome.err
    outcome = run("load", "DIR", f"--x{EVIL}")
    assert outcome.err.startswith("error: no such option: --x\\x1b[31m")
    assert outcome.err.count("\n") == 2


@pytest.mark.parametrize("progress", ["plain", "jsonl", "none"])
def test_what_comes_from_outside_is_shown_as_text(jobs: FakeJobs, run: Run, progress: str) -> None:
    def chatter(observer: Observer) -> None:
        observer(Warned(EVIL, EVIL))
        print(f"a library prints {EVIL}")
        sys.stderr.write(f"and complains {EVIL}\n")

    jobs.action = chatter
    jobs.results["quantize"] = replace(jobs.results["quantize"], out=EVIL, model=EVIL, warnings=(EVIL,))
    outcome = run(*QUANTIZE, "--progress", progress)
    assert outcome.code == 0
    for stream in (outcome.out, outcome.err):
        assert not any(character in stream for character in "\x1b\x9b\r\u202e")
    assert "\nerror: forged" not in outcome.out
    assert "[red]" in outcome.out
    document = run(*QUANTIZE, "--progress", progress, "--json").out
    assert json.loads(document)["out"] == EVIL
    assert document.rstrip("\n").isprintable()


def test_a_device_map_keeps_its_excerpt(run: Run) -> None:
    outcome = run("inspect-map", "M", "--device-map", "cuda:0=5,a\x1bb")
    lines = outcome.err.splitlines()
    assert outcome.code == 2
    assert lines[1:] == ["  cuda:0=5,a?b", "           ^"] or len(lines) == 4
    assert "\x1b" not in outcome.err


RESULTS = [
    ("--help",),
    ("quantize", "--help"),
    ("--version",),
    ("inspect-map", "--explain", "disk-offload"),
    *(
        (*words, *more)
        for words in (QUANTIZE, ("load", "D"), ("inspect-map", "M"))
        for more in ((), ("--json",))
    ),
    (*QUANTIZE, "--dry-run"),
]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_stdout_on_a_full_disk_is_one_line() -> None:
    code = (
        f"for words in {RESULTS!r}:\n"
        "    out = open('/dev/full', 'w')\n"
        "    sys.stdout = out\n"
        "    sys.stderr.write(f'{main([*words])}\\n')\n"
        "    out.close()\n"
        "sys.stdout = open('/dev/full', 'w')\n"
        "sys.exit(main(['inspect-map', 'M']))"
    )
    done = in_a_process(code, stderr=subprocess.PIPE)
    said = "error: standard output cannot be written: no space left on device\n"
    assert done.returncode == 1
    assert done.stderr.count(said) == len(RESULTS) + 1
    assert done.stderr.count("\n1\n") == len(RESULTS)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    ("words", "code"), [(QUANTIZE, 0), ((*QUANTIZE, "--bits", "5"), 2), (("--help",), 0)]
)
def test_a_stderr_on_a_full_disk_changes_nothing(words: tuple[str, ...], code: int) -> None:
    action = "fake.action = lambda observer: sys.stderr.write('a library prints\\n')\n"
    with Path("/dev/full").open("w") as full:
        done = in_a_process(f"{action}sys.exit(main({[*words]!r}))", stdout=subprocess.PIPE, stderr=full)
    assert done.returncode == code
    assert bool(done.stdout) == (code == 0)


def test_a_failed_command_keeps_its_exit_code_where_stdout_is_lost() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with Path("/dev/full").open("w") as full:
        words = [*QUANTIZE, "--bits", "5", "--json"]
        done = in_a_process(f"sys.exit(main({words!r}))", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr.startswith("error: bits is 5")
    assert "error: standard output cannot be written" in done.stderr


def test_a_working_directory_that_was_deleted(
    jobs: FakeJobs, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone() -> str:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "getcwd", gone)
    for words in (QUANTIZE, (*QUANTIZE, "--dry-run"), ("load", "D"), ("inspect-map", "M")):
        outcome = run(*words)
        assert (outcome.code, outcome.out, jobs.called) == (2, "", "")
        assert outcome.err == (
            "error: the working directory cannot be found: no such file or directory\n"
            "  hint: cd to one that exists\n"
        )


@pytest.mark.parametrize("path", ["x" * 5000, "no/such/folder/run.html", "/"])
def test_a_page_that_cannot_be_written_is_refused_first(jobs: FakeJobs, run: Run, path: str) -> None:
    outcome = run(*QUANTIZE, "--report", path)
    assert (outcome.code, jobs.called) == (2, "")
    assert outcome.err.startswith("error: report is ")
