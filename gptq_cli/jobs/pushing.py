"""Uploading a checkpoint to the Hub: `gptq push DIR ID`, and the last step of `quantize --push-to-hub`.

What can be known about the Hub is asked before the work; nothing is uploaded that was not verified.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from gptq_cli.checkpoint.upload import upload
from gptq_cli.checkpoint.verify import verify_checkpoint
from gptq_cli.errors import GptqError, Interrupted, QualityGateFailed
from gptq_cli.events import Observer, PhaseAdvanced, ignore, phase
from gptq_cli.jobs.early import check_push
from gptq_cli.jobs.steps import announce
from gptq_cli.jobs.watching import watching
from gptq_cli.preflight.resolve import refusal
from gptq_cli.results.push import PushConfig, PushReport


def push(path: str, config: PushConfig, observer: Observer = ignore) -> PushReport:
    """Verify the checkpoint at `path` and upload it.

    Raises `PreflightRefused` where the Hub cannot take it, `QualityGateFailed` where the files are not sound,
    `GptqError` where the upload fails.
    """
    with watching("load", observer) as watcher:
        found = check_push(config)
        announce(found, watcher)
        if not found.ok:
            raise refusal(found)
        with phase(watcher, "verify"):
            verified = verify_checkpoint(
                path, on_tensor=lambda done, total: watcher(PhaseAdvanced("verify", done, total))
            )
        if not verified.sound:
            raise QualityGateFailed(
                f"{path} was not uploaded: {'; '.join(verified.failures)}",
                hint=f"gptq load {shlex.quote(path)} --verify",
            )
        return uploaded(path, config, watcher)


def uploaded(path: str, config: PushConfig, observer: Observer) -> PushReport:
    """Upload a checkpoint that was verified. Raises `GptqError`, `Interrupted`, which say how to go on."""
    again = f"to go on: {shlex.join(command(path, config))}"
    started = time.perf_counter()
    try:
        with phase(observer, "upload") as words:
            url = upload(Path(path), config)
            words.append(url)
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted during the upload; {path} is complete", hint=again) from error
    except GptqError as error:
        raise GptqError(f"{error.message}; {path} is complete", hint=again) from error
    return PushReport(
        path=path,
        repo_id=config.repo_id,
        private=config.private,
        url=url,
        seconds=time.perf_counter() - started,
    )


def command(path: str, config: PushConfig) -> list[str]:
    """The command that uploads a finished checkpoint."""
    return ["gptq", "push", path, config.repo_id, *(["--private"] if config.private else [])]
