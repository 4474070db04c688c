"""`gptq load DIR`: open a quantized checkpoint and check that it works."""

from __future__ import annotations

import sys

import typer

from gptq_cli.cli import options as o
from gptq_cli.cli import task_options as task
from gptq_cli.cli.output import Session, show, watch
from gptq_cli.cli.page_file import check_page, with_page
from gptq_cli.errors import ConfigError, QualityGateFailed
from gptq_cli.load_job import LoadJob, Sampling, one_text, task_config
from gptq_cli.placement.device_map import DeviceMap
from gptq_cli.readers import parse_targets
from gptq_cli.results.load import LoadReport


def load(
    context: typer.Context,
    path: o.Checkpoint,
    prompt: o.Prompt = None,
    raw: o.Raw = False,
    max_new_tokens: o.MaxNewTokens = 64,
    temperature: o.Temperature = 0.0,
    top_p: o.TopP = 1.0,
    top_k: o.TopK = 0,
    seed: o.SampleSeed = 0,
    evaluate: o.Evaluate = None,
    seq_len: o.EvalSeqLen = 512,
    windows: o.Windows = 64,
    against: o.Against = None,
    max_kl: o.MaxKl = None,
    max_perplexity: o.MaxPerplexity = None,
    tasks: task.Tasks = None,
    task_dir: task.TaskDir = None,
    task_limit: task.TaskLimit = None,
    shots: task.Shots = None,
    min_score: task.MinScore = None,
    bench: o.Bench = False,
    verify: o.Verify = False,
    target: o.Targets = None,
    tp: o.TensorParallel = 1,
    report: o.Report = None,
    device_map: o.LoadDeviceMap = None,
    kernel: o.Kernel = "auto",
    compile: o.Compile = False,  # noqa: A002  # the option's name
    dtype: o.DType = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    config: o.Config = None,
    as_json: o.Json = False,
    progress: o.Progress = "auto",
    log_file: o.LogFile = None,
    events: o.EventsFile = None,
    quiet: o.Quiet = False,
) -> None:
    """Open the GPTQ checkpoint DIR, show where it was placed and why, and check it: text, accuracy, speed.

    Reads checkpoints of gptq, GPTQModel and AutoGPTQ.

    --verify and --target alone read the files and open no model.
    """
    session: Session = context.obj
    text = one_text(evaluate)
    if prompt == text == "-":
        raise ConfigError(
            "prompt and eval are both '-', and standard input can be read once",
            hint="give --eval a file, or --prompt TEXT",
        )
    job = LoadJob(
        path=path,
        device_map=DeviceMap.parse(device_map) if device_map is not None else None,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        kernel=kernel,
        compile=compile,
        prompt=_from_stdin(raw=raw) if prompt == "-" else prompt,
        raw=raw,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed),
        evaluate=text,
        seq_len=seq_len,
        windows=windows,
        against=against,
        max_kl=max_kl,
        max_perplexity=max_perplexity,
        tasks=task_config(
            tasks, directory=task_dir, limit=task_limit, shots=shots, min_scores=min_score or ()
        ),
        bench=bench,
        verify=verify,
        targets=parse_targets(target or (), tp),
        tp=tp,
    )
    written = {"log_file": session.log_file, "events": session.events}
    page = None if report is None else check_page("report", report, written)
    with watch(session, progress, quiet=quiet) as observer:
        from gptq_cli import jobs

        result = jobs.load(job, observer)
        if page is not None:
            from gptq_cli.report.load_page import load_html

            result = with_page(page, result, load_html, observer, "the figures are on stdout")

    from gptq_cli.display.load import load_summary, verify_summary

    if isinstance(result, LoadReport):
        show(session, result, load_summary)
    else:
        show(session, result, verify_summary)
    if result.failures:
        raise QualityGateFailed(
            "; ".join(result.failures), hint="the figures are on stdout; docs/load.md says what they mean"
        )


def _from_stdin(*, raw: bool) -> str:
    """What standard input holds, to the byte; without `raw` without the line end that echo adds."""
    if sys.stdin is None or sys.stdin.closed:
        raise ConfigError(
            "prompt is '-', but standard input is closed", hint="pipe a text in, or give --prompt TEXT"
        )
    try:
        # bytes, because a text stream turns \r\n into \n and follows the locale
        text = sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read()
        if isinstance(text, bytes):
            text = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"prompt is '-', but standard input is not UTF-8: byte 0x{error.object[error.start]:02x} "
            f"at byte {error.start + 1}",
            hint="convert the text first, for instance with iconv -f latin1 -t utf-8",
        ) from error
    except OSError as error:
        raise ConfigError(
            f"prompt is '-', but standard input cannot be read: {error.strerror or error}",
            hint="pipe a text in, or give --prompt TEXT",
        ) from error
    if not raw:
        text = text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
    if not text:
        raise ConfigError(
            "prompt is '-', but standard input is empty", hint="pipe a text in, or give --prompt TEXT"
        )
    return text
