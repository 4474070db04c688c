"""Every option once: its spelling, its help, its environment variable, its panel on the help page.

A command picks the types it needs. What a configuration holds is not repeated here: see `cli.config_options`.
`--group-size` is `GPTQ_GROUP_SIZE` in the environment and `group_size` in a preset: a flag wins over
the environment, the environment over a preset, a preset over the default.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, get_args

import typer

from gptq_cli import config, readers, recipes
from gptq_cli.cli import completion
from gptq_cli.cli.completion import Complete
from gptq_cli.cli.output import write_document
from gptq_cli.cli.preset import use_preset
from gptq_cli.display.choose import Progress as ProgressKind
from gptq_cli.fields import CardKind
from gptq_cli.fields import Resume as ResumeKind
from gptq_cli.results.document import document

OUTPUT = "Output"
RECIPE = "Recipe"
CALIBRATION = "Calibration"
PLACEMENT = "Placement"
MODEL = "Model"
SOLVER = "Solver"
CHECKS = "Checks"
TEXT = "Text"
RUN = "Run"


_RECIPE_OPTIONS = ", ".join(
    "--" + field.name.replace("_", "-")
    for field in dataclasses.fields(config.QuantizeConfig)
    if field.name in recipes.RECIPE_FIELDS
)


def option(
    names: str,
    help_text: str,
    panel: str,
    metavar: str,
    *,
    is_eager: bool = False,
    callback: Callable[..., Any] | None = None,
    complete: Complete | None = None,
) -> Any:
    """An option with its environment variable; `names` as `--group-size`, or `--sym/--asym` for a flag.

    `complete`: values that begin with what was typed so far.
    """
    name = names.split("/")[0].removeprefix("--")
    return typer.Option(
        names,
        help=help_text,
        rich_help_panel=panel,
        metavar=metavar,
        envvar=f"GPTQ_{name.upper().replace('-', '_')}",
        show_envvar=False,
        is_eager=is_eager,
        callback=callback,
        autocompletion=complete,
    )


def _flag(
    names: str,
    help_text: str,
    panel: str,
    *,
    is_eager: bool = False,
    callback: Callable[..., Any] | None = None,
) -> Any:
    return option(names, help_text, panel, "", is_eager=is_eager, callback=callback)


def _remember_json(context: typer.Context, value: bool) -> bool:
    """Let `main` know at once, so that the error of a later option is a JSON document too."""
    if context.obj is not None:
        context.obj.as_json = value
    return value


def _remember(name: str) -> Callable[[typer.Context, str | None], str | None]:
    """A callback that leaves the value in the session, where `watch` finds it."""

    def remember(context: typer.Context, value: str | None) -> str | None:
        if context.obj is not None:
            setattr(context.obj, name, value)
        return value

    return remember


def lines_of_variable(
    context: typer.Context, parameter: typer.CallbackParam, value: list[str] | None
) -> list[str] | None:
    """The values of a repeatable option, one a line in its variable: a path may hold spaces."""
    origin = context.get_parameter_source(parameter.name or "")
    if origin is None or origin.name != "ENVIRONMENT":
        return value
    return [line for line in os.environ[str(parameter.envvar)].splitlines() if line.strip()]


def _explain(context: typer.Context, value: str | None) -> str | None:
    """`--explain RULE`: print what a rule means, and stop; no model is needed."""
    if value is not None and not context.resilient_parsing:
        if context.obj is not None and context.obj.as_json:
            from gptq_cli.jobs.about import rule

            write_document(document(rule(value)))
            context.obj.documented = True
        else:
            from gptq_cli.preflight.registry import explain

            sys.stdout.write(explain(value).rstrip("\n") + "\n")
        raise typer.Exit
    return value


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model directory, or a Hub model id.",
        envvar="GPTQ_MODEL",
        show_envvar=False,
    ),
]
Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="DIR", help="A GPTQ checkpoint directory.", envvar="GPTQ_CHECKPOINT", show_envvar=False
    ),
]

Out = Annotated[str | None, option("--out", "Directory to create.", OUTPUT, "DIR")]
Overwrite = Annotated[bool, _flag("--overwrite", "Replace --out where it exists, at the very end.", OUTPUT)]
MaxShardSize = Annotated[str, option("--max-shard-size", "Largest file of the checkpoint.", OUTPUT, "SIZE")]
Card = Annotated[
    CardKind,
    option("--card", "Model card (README.md) in the checkpoint: full, none.", OUTPUT, "KIND"),
]
RepoId = Annotated[
    str,
    typer.Argument(metavar="ID", help="user/name on the Hub.", envvar="GPTQ_PUSH_ID", show_envvar=False),
]
PushToHub = Annotated[
    str | None,
    option("--push-to-hub", "Upload the verified result to the Hub as user/name.", OUTPUT, "ID"),
]
Private = Annotated[bool, _flag("--private", "Make the repository on the Hub private.", OUTPUT)]
DryRun = Annotated[
    bool, _flag("--dry-run", "Say what would be done, and whether it fits; read no weight.", RUN)
]
Resume = Annotated[
    ResumeKind,
    option(
        "--resume",
        "Unfinished work of the same job beside --out: auto (go on), never (remove it), required.",
        OUTPUT,
        "KIND",
    ),
]
Blocks = Annotated[
    int | None,
    option(
        "--blocks",
        "A trial: work on the first N blocks, write nothing, say what the whole would take.",
        RUN,
        "N",
    ),
]
Strict = Annotated[
    bool, _flag("--strict", "A linear that is rounded to nearest, or lost, is an error (exit 5).", RUN)
]
Report = Annotated[str | None, option("--report", "Also write the result as one HTML page.", OUTPUT, "FILE")]
Page = Annotated[str | None, option("--out", "Write the page to this HTML file.", OUTPUT, "FILE")]
Json = Annotated[
    bool,
    _flag("--json", "One JSON document on stdout.", RUN, is_eager=True, callback=_remember_json),
]
Progress = Annotated[
    ProgressKind,
    option(
        "--progress",
        "What stderr shows: auto (rich at a terminal, plain elsewhere), rich, plain, jsonl, none.",
        RUN,
        "KIND",
    ),
]
Quiet = Annotated[bool, _flag("--quiet", "Only errors on stderr.", RUN)]
LogFile = Annotated[
    str | None,
    option(
        "--log-file",
        "Also append a line per event, with the time of day, to this file.",
        RUN,
        "FILE",
        callback=_remember("log_file"),
    ),
]
EventsFile = Annotated[
    str | None,
    option(
        "--events",
        "Also append a JSON line per event to this file.",
        RUN,
        "FILE",
        callback=_remember("events"),
    ),
]
Config = Annotated[
    str | None,
    option(
        "--config",
        "A shipped preset such as w4g128, a TOML file with any of these options, or report.json of a run, to "
        "run it again; flags and GPTQ_* variables override it.",
        RUN,
        "PRESET",
        is_eager=True,
        callback=use_preset,
        complete=completion.presets,
    ),
]


Recipe = Annotated[
    recipes.Recipe,
    option(
        "--recipe",
        f"{', '.join(get_args(recipes.Recipe))}: defaults of {_RECIPE_OPTIONS}.",
        RECIPE,
        "NAME",
    ),
]


Modules = Annotated[
    list[str] | None,
    option(
        "--module",
        config.QuantizeConfig.__dataclass_fields__["modules"].metadata["help"],
        RECIPE,
        "RULE",
    ),
]


DeviceMapText = Annotated[
    str,
    option(
        "--device-map",
        "auto, balanced, sequential, a device, NAME=DEVICE,…, inline JSON, or @FILE.",
        PLACEMENT,
        "SPEC",
        complete=completion.device_maps,
    ),
]
LoadDeviceMap = Annotated[
    str | None,
    option(
        "--device-map",
        "As for quantize; default: the current accelerator, cpu where there is none.",
        PLACEMENT,
        "SPEC",
        complete=completion.device_maps,
    ),
]
MaxMemoryText = Annotated[
    str | None,
    option("--max-memory", "Devices to use, and how much of each: 0=20GiB,cpu=48GiB.", PLACEMENT, "LIMITS"),
]
Devices = Annotated[
    str | None,
    option("--devices", "Plan for these, present or not: cuda:0=24GiB@4090,cpu=64GiB.", PLACEMENT, "LIST"),
]

Explain = Annotated[
    str | None,
    option(
        "--explain",
        "Say what a preflight rule means and why it exists, and exit.",
        PLACEMENT,
        "RULE",
        is_eager=True,
        callback=_explain,
        complete=completion.rules,
    ),
]

DType = Annotated[
    config.DType,
    option(
        "--dtype",
        "Run in, and store dense tensors in: auto (as the checkpoint), float16, bfloat16, float32.",
        MODEL,
        "TYPE",
    ),
]
Revision = Annotated[str | None, option("--revision", "Branch, tag or commit on the Hub.", MODEL, "REV")]
TrustRemoteCode = Annotated[
    bool, _flag("--trust-remote-code", "Run Python code that the model repository brings.", MODEL)
]

Prompt = Annotated[
    str | None,
    option("--prompt", "Answer or continue this text as it comes; - reads stdin.", TEXT, "TEXT"),
]
Raw = Annotated[bool, _flag("--raw", "Continue the prompt as it stands, without the chat template.", TEXT)]
MaxNewTokens = Annotated[int, option("--max-new-tokens", "Tokens to generate, at most.", TEXT, "N")]
Temperature = Annotated[
    float, option("--temperature", "Randomness of the next token; 0 is greedy.", TEXT, "X")
]
TopP = Annotated[
    float, option("--top-p", "Sample from the likeliest tokens that hold this probability.", TEXT, "X")
]
TopK = Annotated[int, option("--top-k", "Sample from this many tokens; 0: no limit.", TEXT, "N")]
SampleSeed = Annotated[int, option("--seed", "Seed of the sampling.", TEXT, "N")]
Evaluate = Annotated[
    list[str] | None,
    option(
        "--eval",
        "Measure perplexity on a source as for --calibration, such as pydoc-heldout.",
        CHECKS,
        "SOURCE",
        callback=lines_of_variable,
        complete=completion.texts,
    ),
]
EvalSeqLen = Annotated[int, option("--seq-len", "Tokens per window.", CHECKS, "N")]
Windows = Annotated[int, option("--windows", "Windows to measure, at most.", CHECKS, "N")]
Against = Annotated[
    str | None,
    option(
        "--against",
        "The dense MODEL: adds KL, top-1 agreement and both perplexities, on pydoc-heldout without --eval.",
        CHECKS,
        "MODEL",
    ),
]
AgainstSource = Annotated[
    bool,
    _flag(
        "--against-source",
        "Measure the result against MODEL: KL, top-1 agreement, both perplexities.",
        CHECKS,
    ),
]
MaxKl = Annotated[
    float | None,
    option("--max-kl", "Exit 5 where KL(dense, quantized) is above this, nats per token.", CHECKS, "X"),
]
MaxPerplexity = Annotated[
    float | None, option("--max-perplexity", "Exit 5 where the perplexity is above this.", CHECKS, "X")
]
Bench = Annotated[
    bool, _flag("--bench", "Time prompt and decoding, the dense model's too with --against.", CHECKS)
]
Verify = Annotated[
    bool, _flag("--verify", "Check every tensor and setting of the files; exit 5 on an error.", CHECKS)
]
Targets = Annotated[
    list[str] | None,
    option(
        "--target",
        f"Exit 5 where this reader will not take it: {', '.join(get_args(readers.Target))}. Repeatable.",
        CHECKS,
        "NAME",
        complete=completion.targets,
    ),
]
_RANKS = "over this many GPUs by tensor parallelism in vLLM and SGLang, or those of them that --target names."
TensorParallel = Annotated[int, option("--tp", f"Exit 5 where it does not divide {_RANKS}", CHECKS, "N")]
QuantizeTensorParallel = Annotated[int, option("--tp", f"Refuse what would not divide {_RANKS}", OUTPUT, "N")]
QuantizeTargets = Annotated[
    list[str] | None,
    option(
        "--target",
        f"Refuse settings that this reader will not take: {', '.join(get_args(readers.Target))}. Repeatable.",
        OUTPUT,
        "NAME",
        complete=completion.targets,
    ),
]
Kernel = Annotated[
    config.KernelChoice,
    option("--kernel", "auto, torch, dequantize, or gptqmodel where it is installed.", PLACEMENT, "KIND"),
]
Compile = Annotated[
    bool, _flag("--compile", "Let torch.compile fuse what lies between the kernels.", PLACEMENT)
]
