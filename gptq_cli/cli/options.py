"""Every option once: its spelling, its help, its environment variable, its panel on the help page.

A command picks the types it needs and gives the defaults, which are those of `gptq_cli.config`.
`--group-size` is `GPTQ_GROUP_SIZE` in the environment and `group_size` in a preset: a flag wins over
the environment, the environment over a preset, a preset over the default.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from gptq_cli import config
from gptq_cli.cli.preset import use_preset
from gptq_cli.display.choose import Progress as ProgressKind

OUTPUT = "Output"
RECIPE = "Recipe"
CALIBRATION = "Calibration"
PLACEMENT = "Placement"
MODEL = "Model"
SOLVER = "Solver"
PROOF = "Proof"
TEXT = "Text"
RUN = "Run"


def _option(
    names: str,
    help_text: str,
    panel: str,
    metavar: str,
    *,
    is_eager: bool = False,
    callback: Callable[..., Any] | None = None,
) -> Any:
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
    )


def _flag(
    names: str,
    help_text: str,
    panel: str,
    *,
    is_eager: bool = False,
    callback: Callable[..., Any] | None = None,
) -> Any:
    return _option(names, help_text, panel, "", is_eager=is_eager, callback=callback)


def _remember_json(context: typer.Context, value: bool) -> bool:
    """Tell `main` at once, so that an error of a later option is a JSON document, too."""
    if context.obj is not None:
        context.obj.as_json = value
    return value


def _explain(context: typer.Context, value: str | None) -> str | None:
    """`--explain RULE`: print what a rule means, and stop; no model is needed."""
    if value is not None and not context.resilient_parsing:
        from gptq_cli.preflight.registry import explain

        sys.stdout.write(explain(value).rstrip("\n") + "\n")
        raise typer.Exit
    return value


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model directory, or an id of the hub.",
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

Out = Annotated[str | None, _option("--out", "Directory to create.", OUTPUT, "DIR")]
Overwrite = Annotated[bool, _flag("--overwrite", "Replace --out where it exists, as the last act.", OUTPUT)]
MaxShardSize = Annotated[str, _option("--max-shard-size", "Largest file of the checkpoint.", OUTPUT, "SIZE")]
DryRun = Annotated[
    bool, _flag("--dry-run", "Say what would be done, and whether it fits; read no weight.", RUN)
]
Strict = Annotated[bool, _flag("--strict", "A fallback to round-to-nearest is an error (exit 5).", RUN)]
Report = Annotated[
    str | None, _option("--report", "Also write the run as one HTML page with plots.", OUTPUT, "FILE")
]
Json = Annotated[
    bool,
    _flag("--json", "One JSON document on stdout.", RUN, is_eager=True, callback=_remember_json),
]
Progress = Annotated[
    ProgressKind,
    _option(
        "--progress",
        "What stderr shows: auto (rich at a terminal, plain elsewhere), rich, plain, jsonl, none.",
        RUN,
        "KIND",
    ),
]
Quiet = Annotated[bool, _flag("--quiet", "Nothing on stderr but errors.", RUN)]
Config = Annotated[
    str | None,
    _option(
        "--config",
        "Preset with any of these options; flags and GPTQ_* variables override it.",
        RUN,
        "FILE.toml",
        is_eager=True,
        callback=use_preset,
    ),
]

Bits = Annotated[int, _option("--bits", "Bits of a code: 2, 3, 4 or 8.", RECIPE, "N")]
GroupSize = Annotated[
    str,
    _option(
        "--group-size",
        "Input columns that share a scale; auto: 128, 64 or 32, the largest that divides every linear; "
        "-1: one group a row.",
        RECIPE,
        "N",
    ),
]
Sym = Annotated[bool, _flag("--sym/--asym", "Zero point fixed at the middle code, or free.", RECIPE)]
DescAct = Annotated[
    bool,
    _flag(
        "--desc-act/--no-desc-act", "Groups follow the solving order (g_idx); some servers refuse it.", RECIPE
    ),
]

ActOrder = Annotated[
    config.ActOrder,
    _option(
        "--act-order",
        "Order of columns inside the solver, groups staying in place: static or none.",
        SOLVER,
        "KIND",
    ),
]
DampPercent = Annotated[
    float, _option("--damp-percent", "Damping, a fraction of the mean Hessian diagonal.", SOLVER, "X")
]
TrueSequential = Annotated[
    bool,
    _flag(
        "--true-sequential/--no-true-sequential",
        "Later stages of a block see its earlier ones quantized.",
        SOLVER,
    ),
]
ScaleSearch = Annotated[
    config.ScaleSearch,
    _option("--scale-search", "How the scale of a group is found: minmax, mse or hessian.", SOLVER, "KIND"),
]
PositiveScales = Annotated[
    bool,
    _flag("--positive-scales/--signed-scales", "Forbid negative scales, or allow them (sym only).", SOLVER),
]
Recipe = Annotated[
    config.Recipe,
    _option(
        "--recipe",
        "fast, balanced or best: defaults of --sweeps, --refit, --solve-for, --dense-share.",
        RECIPE,
        "NAME",
    ),
]
Sweeps = Annotated[
    int | None,
    _option(
        "--sweeps",
        "Coordinate-descent sweeps over the codes after the solve; default: --recipe's.",
        SOLVER,
        "N",
    ),
]
Refit = Annotated[
    bool | None,
    _flag("--refit/--no-refit", "Refit the scales where the loss falls; default: --recipe's.", SOLVER),
]
SolveFor = Annotated[
    config.SolveFor | None,
    _option(
        "--solve-for",
        "Whose outputs a linear should meet: own or dense (the dense model's); default: --recipe's.",
        SOLVER,
        "KIND",
    ),
]
DenseShare = Annotated[
    float | None,
    _option(
        "--dense-share",
        "Share of the samples that the dense model runs on too, 0 to 1; default: --recipe's.",
        SOLVER,
        "FRACTION",
    ),
]
ColumnBatch = Annotated[
    int,
    _option(
        "--column-batch",
        "Columns of one lazy update, for speed; codes vary as sums are rounded in another order.",
        SOLVER,
        "N",
    ),
]

Calibration = Annotated[
    str,
    _option(
        "--calibration",
        "pydoc (offline), a text, JSONL or parquet file, - for stdin, wikitext2, c4, or a hub data set "
        "id:config:split:column.",
        CALIBRATION,
        "SOURCE",
    ),
]
Samples = Annotated[int, _option("--samples", "Windows of text.", CALIBRATION, "N")]
SeqLen = Annotated[int, _option("--seq-len", "Tokens of a window.", CALIBRATION, "N")]
Seed = Annotated[int, _option("--seed", "Seed that picks the windows.", CALIBRATION, "N")]
BatchSize = Annotated[
    int | None,
    _option("--batch-size", "Windows a forward; default: 2048 tokens' worth.", CALIBRATION, "N"),
]

DeviceMapText = Annotated[
    str,
    _option(
        "--device-map",
        "auto, balanced, sequential, a device, NAME=DEVICE,…, inline JSON, or @FILE.",
        PLACEMENT,
        "SPEC",
    ),
]
LoadDeviceMap = Annotated[
    str | None,
    _option(
        "--device-map",
        "As for quantize; default: the current accelerator, cpu where there is none.",
        PLACEMENT,
        "SPEC",
    ),
]
MaxMemoryText = Annotated[
    str | None,
    _option("--max-memory", "Devices to use, and how much of each: 0=20GiB,cpu=48GiB.", PLACEMENT, "LIMITS"),
]
Devices = Annotated[
    str | None,
    _option(
        "--devices", "Plan for these devices, present or not: cuda:0=24GiB,cpu=64GiB.", PLACEMENT, "LIST"
    ),
]

Explain = Annotated[
    str | None,
    _option(
        "--explain",
        "Say what a preflight rule means and why it exists, and exit.",
        PLACEMENT,
        "RULE",
        is_eager=True,
        callback=_explain,
    ),
]

DType = Annotated[
    config.DType,
    _option(
        "--dtype",
        "Run in, and store dense tensors in: auto (as the checkpoint), float16, bfloat16, float32.",
        MODEL,
        "TYPE",
    ),
]
Revision = Annotated[str | None, _option("--revision", "Branch, tag or commit on the hub.", MODEL, "REV")]
TrustRemoteCode = Annotated[
    bool, _flag("--trust-remote-code", "Run Python code that the model repository brings.", MODEL)
]

Prompt = Annotated[
    str | None,
    _option("--prompt", "Answer or continue this text as it comes; - reads stdin.", TEXT, "TEXT"),
]
Raw = Annotated[bool, _flag("--raw", "Continue the prompt as it stands, without the chat template.", TEXT)]
MaxNewTokens = Annotated[int, _option("--max-new-tokens", "Tokens to generate, at most.", TEXT, "N")]
Temperature = Annotated[
    float, _option("--temperature", "Randomness of the next token; 0 is greedy.", TEXT, "X")
]
TopP = Annotated[
    float, _option("--top-p", "Sample from the likeliest tokens that hold this probability.", TEXT, "X")
]
TopK = Annotated[int, _option("--top-k", "Sample from this many tokens; 0: no limit.", TEXT, "N")]
SampleSeed = Annotated[int, _option("--seed", "Seed of the sampling.", TEXT, "N")]
Evaluate = Annotated[
    str | None,
    _option(
        "--eval",
        "Measure perplexity on a source as for --calibration, such as pydoc-heldout.",
        PROOF,
        "SOURCE",
    ),
]
EvalSeqLen = Annotated[int, _option("--seq-len", "Tokens of a window.", PROOF, "N")]
Windows = Annotated[int, _option("--windows", "Windows to measure, at most.", PROOF, "N")]
Against = Annotated[
    str | None,
    _option(
        "--against",
        "The dense MODEL: adds KL, top-1 agreement and both perplexities, on pydoc-heldout without --eval.",
        PROOF,
        "MODEL",
    ),
]
MaxKl = Annotated[
    float | None,
    _option("--max-kl", "Exit 5 where KL(dense, quantized) is above this, nats a token.", PROOF, "X"),
]
MaxPerplexity = Annotated[
    float | None, _option("--max-perplexity", "Exit 5 where the perplexity is above this.", PROOF, "X")
]
Bench = Annotated[
    bool, _flag("--bench", "Time prompt and decoding, the dense model's too with --against.", PROOF)
]
Verify = Annotated[
    bool, _flag("--verify", "Judge every tensor and setting of the files; exit 5 on an error.", PROOF)
]
Targets = Annotated[
    list[str] | None,
    _option(
        "--target",
        "Exit 5 where this reader will not take it: vllm, sglang, transformers, exllamav2, gptqmodel. "
        "Repeatable.",
        PROOF,
        "NAME",
    ),
]
QuantizeTargets = Annotated[
    list[str] | None,
    _option(
        "--target",
        "Refuse settings that this reader will not take: vllm, sglang, transformers, exllamav2, gptqmodel. "
        "Repeatable.",
        OUTPUT,
        "NAME",
    ),
]
Kernel = Annotated[
    config.KernelChoice,
    _option("--kernel", "auto, torch, dequantize, or gptqmodel where it is installed.", PLACEMENT, "KIND"),
]
Compile = Annotated[
    bool, _flag("--compile", "Let torch.compile fuse what lies between the kernels.", PLACEMENT)
]
