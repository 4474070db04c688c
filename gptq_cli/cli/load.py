"""`gptq load DIR`: open a quantized checkpoint and prove that it works."""

from __future__ import annotations

import sys

import typer

from gptq_cli.cli import options as o
from gptq_cli.cli.output import Session, show, watch
from gptq_cli.config import LoadJob
from gptq_cli.device_map import DeviceMap
from gptq_cli.errors import ConfigError


def load(
    context: typer.Context,
    path: o.Checkpoint,
    prompt: o.Prompt = None,
    max_new_tokens: o.MaxNewTokens = 64,
    evaluate: o.Evaluate = None,
    seq_len: o.EvalSeqLen = 512,
    windows: o.Windows = 64,
    device_map: o.LoadDeviceMap = None,
    dtype: o.DType = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    config: o.Config = None,
    as_json: o.Json = False,
    progress: o.Progress = "auto",
    quiet: o.Quiet = False,
) -> None:
    """Open the GPTQ checkpoint DIR, say where it stands and why, generate from --prompt, measure --eval.

    Reads checkpoints of gptq, GPTQModel and AutoGPTQ.
    """
    session: Session = context.obj
    job = LoadJob(
        path=path,
        device_map=DeviceMap.parse(device_map) if device_map is not None else None,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        prompt=_from_stdin() if prompt == "-" else prompt,
        max_new_tokens=max_new_tokens,
        evaluate=evaluate,
        seq_len=seq_len,
        windows=windows,
    )
    with watch(session, progress, quiet=quiet) as observer:
        from gptq_cli import jobs

        report = jobs.load(job, observer)

    from gptq_cli.display.tables import load_summary

    show(session, report, lambda: load_summary(report))
    if report.text is not None and not session.as_json and sys.stdout is not None:
        sys.stdout.write(f"\n{report.text}\n")
        sys.stdout.flush()


def _from_stdin() -> str:
    if sys.stdin is None or sys.stdin.closed:
        raise ConfigError(
            "prompt is '-', but standard input is closed", hint="pipe a text in, or give --prompt TEXT"
        )
    text = sys.stdin.read().rstrip("\n")
    if not text:
        raise ConfigError(
            "prompt is '-', but standard input is empty", hint="pipe a text in, or give --prompt TEXT"
        )
    return text
