"""Rules about unfinished work: does the run go on where an earlier one with the same output ended?"""

from __future__ import annotations

from gptq_cli.planning.cases import JobCase
from gptq_cli.rules import Remark, rule
from gptq_cli.wording import names_text

_NEVER = "--resume never"


@rule("note")
def work_continued(case: JobCase) -> list[Remark]:
    """An earlier run of the same job ended before its checkpoint was in place. The blocks that it had
    finished, and its gradients, are kept beside the output, and the run goes on after them: the result is
    the same to the last byte. It is the same job where the model's files, the settings that change codes, the
    calibration tokens, the dtype and the maths are the same; the device map, the batch size, the machine and
    the display may differ.
    """
    work = case.output.work if case.output is not None else None
    if work is None or not work.continued:
        return []
    return [Remark(subject="--out", message=f"found {work.words}; the run goes on from there")]


@rule("error")
def work_of_another_job(case: JobCase) -> list[Remark]:
    """The working folder beside the output holds unfinished work of a job that would give other codes or
    other files. It is not touched: it may be hours of work. `--resume never` removes it and starts over;
    another output leaves it where it is.
    """
    out = case.output
    work = out.work if out is not None else None
    if out is None or work is None or not work.differences or work.resume == "never":
        return []
    return [
        Remark(
            subject="--out",
            message=f"{work.folder} holds {work.words}, of another job; it differs in "
            f"{names_text(work.differences)}",
            hint=f"{_NEVER} (removes it and starts over); or {out.elsewhere}",
        )
    ]


@rule("error")
def work_required(case: JobCase) -> list[Remark]:
    """`--resume required` was given, and there is nothing to go on with: no run with this output was
    interrupted after it had finished something, or what it kept is damaged.
    """
    out = case.output
    if out is None or out.resume != "required" or (out.work is not None and not out.work.problem):
        return []
    why = f"cannot be used: {out.work.problem}" if out.work is not None else "is not there"
    return [
        Remark(
            subject="--resume",
            message=f"required, but unfinished work for {out.out} {why}",
            hint="--resume auto (starts from the beginning)",
        )
    ]


@rule("warning", "note")
def work_removed(case: JobCase) -> list[Remark]:
    """Unfinished work of an earlier run is removed, and the run starts over: because `--resume never` was
    given, or because the journal of that work is damaged.
    """
    work = case.output.work if case.output is not None else None
    if work is None or (not work.problem and work.resume != "never") or work.resume == "required":
        return []
    held = work.words or "unfinished work of an earlier run"
    why = f"it cannot be used: {work.problem}" if work.problem else f"{_NEVER} was given"
    return [
        Remark(
            subject="--out",
            message=f"{held} in {work.folder} will be removed, and the run starts over: {why}",
            level="warning" if work.problem else "note",
        )
    ]
