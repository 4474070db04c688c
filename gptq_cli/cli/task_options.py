"""Options about the tasks of lm-evaluation-harness, for `load` and `quantize`."""

from __future__ import annotations

from typing import Annotated

from gptq_cli.cli.options import CHECKS, option

Tasks = Annotated[
    str | None,
    option(
        "--tasks",
        "Score these tasks of lm-evaluation-harness: arc_easy,hellaswag; needs the extra eval.",
        CHECKS,
        "NAMES",
    ),
]
TaskDir = Annotated[
    str | None, option("--task-dir", "A folder with YAML files of tasks, searched first.", CHECKS, "DIR")
]
TaskLimit = Annotated[int | None, option("--task-limit", "Questions of each task, at most.", CHECKS, "N")]
Shots = Annotated[
    int | None, option("--shots", "Examples before each question; default: as the task says.", CHECKS, "N")
]
MinScore = Annotated[
    list[str] | None,
    option(
        "--min-score",
        "Exit 5 where a task's score is below this, as arc_easy=0.4. Repeatable.",
        CHECKS,
        "RULE",
    ),
]
