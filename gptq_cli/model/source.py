"""Listing a model's tensors from the headers of its files; what is wrong with the files is returned as facts.

`find_model` raises only where there is no model at all: no such directory, an unreachable Hub, no
config.json. Everything wrong *inside* a model directory (a truncated shard, a pickle, a shard missing from
the index) is a `SourceProblem`, so that preflight can list all of them at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptq_cli.devices.out_of_memory import is_out_of_memory
from gptq_cli.files import unreadable
from gptq_cli.model.facts import DecodedSource, TensorInfo
from gptq_cli.model.headers import (
    NAME_LIMIT,
    VALUES_LIMIT,
    HeaderError,
    brief,
    count_values,
    read_header,
)
from gptq_cli.model.source_files import (
    CONFIGS,
    TOKENIZER_FILES,
    FileStamp,
    NotRegularError,
    check_unchanged,
    content_elsewhere,
    has_tokenizer,
    is_copied,
    is_needed,
    is_parsed,
    is_pointer,
    link_to_nothing,
    open_regular,
    outside_target,
    oversize,
    small_files,
    special_kind,
    stamps_of,
    unsafe_path,
)
from gptq_cli.wording import names_text, number_of

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
_INDEX_ENDING = ".safetensors.index.json"
_JSON_LIMIT_BYTES = 100_000_000
_AGAIN = "fetch the model again"
READABLE = frozenset({"no-tokenizer", "outside-link", "link-left-out", "pointer-left-out", "unlisted-tensor"})
"""Problems that matter when files are copied or text is tokenized, or to others, but not when a model is only
opened."""

Progress = Callable[[int, int | None], None]
"""Called with (bytes done, bytes in all) while files are fetched."""


@dataclass(frozen=True, slots=True)
class SourceProblem:
    """Something wrong with a model's files."""

    kind: str
    """Stable, kebab-case: truncated-shard, corrupt-shard, missing-shard, unlisted-shard, missing-tensor,
    unlisted-tensor, bad-index, unsafe-path, special-file, file-not-fetched, file-too-large, outside-link,
    link-left-out, pointer-left-out, pickled-weights, no-weights, no-tokenizer, missing-weight,
    shape-mismatch, unreadable-shard, unreadable-file, broken-settings, unsupported-dtype, missing-scale,
    scale-mismatch, unknown-scaling, left-over-config."""
    subject: str
    """The file or tensor."""
    message: str
    """Lower case, one sentence, complete in itself."""
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A model's files, known by their headers only."""

    directory: Path
    """Where config.json and the tokenizer are; the weights, too, unless they were not fetched."""
    source: str
    """The directory or the Hub model id that was given."""
    revision: str | None = None
    """The commit, for a model on the Hub."""
    tensors: tuple[TensorInfo, ...] = ()
    shards: tuple[Path, ...] = ()
    problems: tuple[SourceProblem, ...] = ()
    stamps: tuple[FileStamp, ...] = ()
    """The state of every file that is read or copied, when it was listed."""
    decoded: DecodedSource | None = None
    """Set by `few_bits.decoded_files`: some of `tensors` are stored in few bits."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(tensor.stored_bytes for tensor in self.tensors)

    def check(self, *names: str) -> None:
        """Raise `SourceChanged` if one of these files (without names: any) has changed since it was
        listed."""
        check_unchanged(self.directory, (s for s in self.stamps if not names or s.name in names))


def scan_directory(
    directory: Path, *, source: str | None = None, bases: Sequence[str] | None = None
) -> ModelFiles:
    """List the tensors of a local directory, and everything that is wrong with its files.

    `bases`: names that the weights may have in place of `model` (AutoGPTQ: gptq_model-4bit-128g), the most
    likely first. Where it is given, even empty, a single file or index may have any name.
    """
    problems: list[SourceProblem] = []
    names, listed = _shard_names(directory, problems, bases)
    small = tuple(small_files(directory))
    stamps = stamps_of(directory, (*names, *(n for n in small if is_copied(n) or n in (INDEX, *CONFIGS))))
    problems += _not_plain(directory, (*names, *small))
    tensors: list[TensorInfo] = []
    shards: list[Path] = []
    holder: dict[str, str] = {}
    for name in names:
        found = _read_shard(directory / name, name, problems)
        if found is None:
            continue
        shards.append(directory / name)
        for tensor in found:
            if tensor.name in holder:
                problems.append(
                    SourceProblem(
                        "corrupt-shard",
                        name,
                        f"tensor {tensor.name} is in {holder[tensor.name]} and in {name}",
                    )
                )
                continue
            holder[tensor.name] = name
            tensors.append(tensor)
    readable = {shard.name for shard in shards} | {str(shard.relative_to(directory)) for shard in shards}
    problems += _against_index(listed, holder, readable)
    if not has_tokenizer(directory):
        problems.append(
            SourceProblem(
                "no-tokenizer",
                str(directory),
                f"there is no tokenizer in {directory} (none of {', '.join(TOKENIZER_FILES[:3])}, …)",
                "copy the tokenizer files of the model into its directory",
            )
        )
    return ModelFiles(
        directory=directory,
        source=source or str(directory),
        tensors=tuple(tensors),
        shards=tuple(shards),
        problems=tuple(problems),
        stamps=stamps,
    )


def _against_index(
    listed: Mapping[str, str], holder: Mapping[str, str], readable: Collection[str]
) -> Iterator[SourceProblem]:
    """Where the index and the shards that can be read disagree about which tensor is where."""
    for name, shard in listed.items():
        if shard in readable and holder.get(name) != shard:
            message = f"the index puts tensor {name} into {shard}, which does not hold it"
            yield SourceProblem("missing-tensor", name, message, _AGAIN)
    left_out: dict[str, list[str]] = {}
    for name, shard in holder.items() if listed else ():
        if name not in listed:
            left_out.setdefault(shard, []).append(name)
    for shard, names in left_out.items():
        held = f"{shard} holds {number_of(len(names), 'tensor')} that the index leaves out"
        message = f"{held} ({names_text(names, 3)}): readers that go by the index lose what it does not name"
        yield SourceProblem("unlisted-tensor", shard, message, _AGAIN)


def _not_plain(directory: Path, names: Iterable[str]) -> Iterator[SourceProblem]:
    """Problems for the names that are not regular files, or are links that lead out of the directory."""
    for name in names:
        kind, target = special_kind(directory / name), outside_target(directory, name)
        needed = is_needed(name) or name.endswith(".safetensors")
        pointer = is_pointer(directory / name)
        if kind is not None:
            yield SourceProblem(
                "special-file",
                name,
                f"{name} is {kind}; allowed: a file",
                f"remove {name} from {directory}; if it came with the model, do not trust the model",
            )
        elif (size := oversize(directory, name)) is not None:
            found, allowed = size
            yield SourceProblem(
                "file-too-large",
                name,
                f"{name} has {found} bytes; allowed: {allowed}",
                f"compare {name} with the one that the model was published with",
            )
        elif (needed or (pointer and is_parsed(name))) and (other := content_elsewhere(directory / name)):
            yield SourceProblem("file-not-fetched", name, f"{name} {other[0]}", other[1])
        elif target is not None and needed:
            yield SourceProblem(
                "outside-link",
                name,
                f"{name} {_leads_out(target)}",
                f"if that is intended, replace the link by a copy: cp --remove-destination {target} "
                f"{directory / name}",
            )
        elif is_copied(name) and pointer and (other := content_elsewhere(directory / name)):
            yield SourceProblem(
                "pointer-left-out", name, f"{name} {other[0]}: it is left out of the checkpoint", other[1]
            )
        elif is_copied(name) and (astray := link_to_nothing(directory / name) or _leads_out(target)):
            yield SourceProblem(
                "link-left-out",
                name,
                f"{name} {astray}: it is left out of the checkpoint",
                "if it belongs to the model, put the file in the place of the link",
            )


def _leads_out(target: str | None) -> str:
    return f"is a link that leads out of the model's directory, to {target}" if target is not None else ""


def read_json(path: Path, *, limit_bytes: int = _JSON_LIMIT_BYTES) -> Any:
    """Parse a JSON file of limited size. Raises `ValueError`, which names the file, and `OSError`."""
    try:
        with open_regular(path) as file:
            data = file.read(limit_bytes + 1)
    except NotRegularError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from error
    if len(data) > limit_bytes:
        raise ValueError(f"{path.name} has more than {limit_bytes} bytes, which is the limit")
    if (values := count_values(data)) > VALUES_LIMIT:
        raise ValueError(f"{path.name} holds about {values} values; allowed: {VALUES_LIMIT}")
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not valid JSON: {error}") from error


def _shard_names(
    directory: Path, problems: list[SourceProblem], bases: Sequence[str] | None
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The shards to read in order, and the index's tensor -> shard map (empty without an index)."""
    found = _weights_file(directory, bases)
    if found is None:
        problems.append(_no_weights(directory, named=bases is not None))
        return (), {}
    if not found.endswith(_INDEX_ENDING):
        return (found,), {}
    try:
        weight_map = index_map(read_json(directory / found), found)
    except (OSError, ValueError) as error:
        if content_elsewhere(directory / found) is None:  # that is reported with the other files
            problems.append(SourceProblem("bad-index", found, str(error), _AGAIN))
        return (), {}
    names = tuple(sorted(set(weight_map.values())))
    safe: list[str] = []
    for name in names:
        if unsafe_path(name):
            problems.append(
                SourceProblem(
                    "unsafe-path",
                    found,
                    f"the index names shard {name!r}, which would leave the model's directory",
                    "do not trust this model; fetch it from its author",
                )
            )
        elif not name.endswith(".safetensors"):
            problems.append(
                SourceProblem(
                    "pickled-weights", found, f"the index names shard {name!r}; allowed: *.safetensors"
                )
            )
        else:
            safe.append(name)
    base = found.removesuffix(_INDEX_ENDING)
    present = {p.name for p in directory.iterdir() if _is_shard(p.name, base)}
    unlisted = sorted(present - set(names))
    message = "is in the directory, but the index does not name it"
    problems.extend(SourceProblem("unlisted-shard", name, f"{name} {message}", _AGAIN) for name in unlisted)
    return tuple(safe), weight_map


def _weights_file(directory: Path, bases: Sequence[str] | None) -> str | None:
    """The name in `directory` of the file that holds all tensors, or of the index of its shards."""
    for base in (*(bases or ()), "model"):
        if unsafe_path(base):
            continue
        single, index = f"{base}.safetensors", f"{base}{_INDEX_ENDING}"
        if (directory / single).exists() or (directory / single).is_symlink():
            return single
        if (directory / index).is_file() or (directory / index).is_symlink():
            return index
    if bases is None:
        return None
    indexes = sorted(path.name for path in directory.glob(f"*{_INDEX_ENDING}"))
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    packed = [name for name in files if holds_codes(directory / name)] if len(files) > 1 else []
    return next((names[0] for names in (indexes, files, packed) if len(names) == 1), None)


def holds_codes(path: Path) -> bool:
    """Whether a safetensors file has packed linears, unlike an adapter or a dense model beside it."""
    try:
        return any(tensor.name.endswith(".qweight") for tensor in read_header(path))
    except (HeaderError, OSError):
        return False


def index_map(index: object, name: str = INDEX) -> dict[str, str]:
    """The checked `weight_map` of the parsed index file `name`. Raises `ValueError`."""
    weight_map = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise ValueError(f"{name} has no weight_map")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or len(shard) > NAME_LIMIT or len(tensor) > NAME_LIMIT:
            raise ValueError(f"{name} maps tensor {brief(tensor)} to {brief(shard)}; allowed: a file name")
    return dict(weight_map)


def _is_shard(name: str, base: str) -> bool:
    """`model-00001-of-00003.safetensors` for the base `model`."""
    return re.fullmatch(re.escape(base) + r"-.*-of-.*\.safetensors", name) is not None


def _no_weights(directory: Path, *, named: bool) -> SourceProblem:
    files = sorted(path.name for path in directory.iterdir())
    pickles = [name for name in files if name.endswith(PICKLES)]
    if pickles:
        return SourceProblem(
            "pickled-weights",
            pickles[0],
            f"the weights are pickled ({', '.join(pickles[:3])}{', …' if len(pickles) > 3 else ''}); "
            "a pickle can run any program when it is opened, so only safetensors files are read",
            "convert them once, in an environment where running their code is safe: "
            'python -c "from transformers import AutoModelForCausalLM as A; '
            f"A.from_pretrained('{directory}', dtype='auto').save_pretrained('{directory}')\"",
        )
    ggufs = [name for name in files if name.endswith(".gguf")]
    if ggufs:
        return SourceProblem(
            "no-weights",
            ggufs[0],
            f"the only weights are GGUF ({ggufs[0]}), which are quantized already",
            "give the original model in safetensors",
        )
    several = [name for name in files if name.endswith(".safetensors")]
    if named and several:
        return SourceProblem(
            "no-weights",
            str(directory),
            f"there is neither {SINGLE} nor an index in {directory}, and nothing says which of "
            f"{', '.join(several[:3])}{', …' if several[3:] else ''} holds the weights",
            "fetch the index of the shards, or name the file as model_file_base_name in quantize_config.json",
        )
    return SourceProblem(
        "no-weights",
        str(directory),
        f"there is neither {SINGLE} nor {INDEX} in {directory}",
        "fetch the model's safetensors files",
    )


def _read_shard(path: Path, name: str, problems: list[SourceProblem]) -> tuple[TensorInfo, ...] | None:
    if content_elsewhere(path) is not None:
        return None  # reported with the other files
    try:
        stored = read_header(path)
    except FileNotFoundError:
        problems.append(
            SourceProblem("missing-shard", name, f"shard {name} is missing", "fetch the model again")
        )
        return None
    except HeaderError as error:
        kind = "truncated-shard" if "truncated" in str(error) else "corrupt-shard"
        problems.append(SourceProblem(kind, name, f"shard {name}: {error}", "fetch the file again"))
        return None
    except OSError as error:
        if is_out_of_memory(error):
            raise
        problems.append(SourceProblem("unreadable-shard", name, *unreadable(f"shard {name}", path, error)))
        return None
    return tuple(TensorInfo(t.name, t.shape, t.dtype, t.size_bytes, name) for t in stored)


def without_weight_files(files: ModelFiles, tensors: Iterable[TensorInfo]) -> ModelFiles:
    """`files` with tensors that were listed remotely, and no local shard."""
    problems = tuple(p for p in files.problems if p.kind not in ("no-weights", "missing-shard"))
    return replace(files, tensors=tuple(tensors), shards=(), problems=problems)
