"""Fetching a model from the Hugging Face Hub: small files first, then exactly the shards in the index.

Nothing is executed, pickles are never fetched, and Python files only with `--trust-remote-code`. `HF_TOKEN`,
`HF_HOME`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` are honoured by `huggingface_hub` itself; offline, its cache
is used.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shlex
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_safetensors_metadata, snapshot_download
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.file_download import repo_folder_name

from gptq_cli.config import ModelRef
from gptq_cli.devices.out_of_memory import is_out_of_memory
from gptq_cli.errors import ModelError
from gptq_cli.files import reason, shown
from gptq_cli.model.facts import TensorInfo
from gptq_cli.model.headers import DTYPES
from gptq_cli.model.source import (
    INDEX,
    PICKLES,
    SINGLE,
    ModelFiles,
    Progress,
    SourceProblem,
    index_map,
    read_json,
    scan_directory,
    without_weight_files,
)
from gptq_cli.model.source_files import has_tokenizer, unsafe_path
from gptq_cli.wording import first_line, names_text

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*", "README.md")
_HTTP_CLIENTS = ("httpx", "httpcore", "requests", "urllib3")
"""HTTP clients of the various versions of `huggingface_hub`; their errors are network errors."""
_ONLINE = "connect to the network, and unset HF_HUB_OFFLINE"
_NOT_ALLOWED = (401, 403)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
LEFT_OUT = ("*/*", "*.safetensors", *(f"*{suffix}" for suffix in PICKLES), "*.gguf", "*.onnx")


def fetch(ref: ModelRef, *, weights: bool, progress: Progress | None) -> ModelFiles:
    """Download `ref` (or find it in the cache) and list its tensors. Raises `ModelError` with a hint."""
    directory = fetch_small(ref)
    if not weights:
        files = scan_directory(directory, source=ref.model)
        if not files.tensors:
            files = _remote_tensors(ref, files)
    else:
        with _explained(ref):  # a branch may have moved on: the weights are those of the same commit
            same, shards = replace(ref, revision=_commit(directory) or ref.revision), _shards(directory)
            _snapshot(same, shards, progress and _announced(progress, _bytes_to_come(directory, shards)))
        files = scan_directory(directory, source=ref.model)
        if any(problem.kind == "no-weights" for problem in files.problems):
            files = _name_pickles(ref, files)
        if hub_constants.HF_HUB_OFFLINE:
            files = _only_cached(ref, files)
        files = _fetched_again(same, files)
    return replace(files, revision=_commit(directory))


def fetch_small(ref: ModelRef) -> Path:
    """Download configs, tokenizer and licence of `ref` (or find them in the cache). Raises `ModelError`."""
    patterns = [*SMALL_FILES, "*.py"] if ref.trust_remote_code else list(SMALL_FILES)
    with _explained(ref):
        directory = _snapshot(ref, patterns, None, ignore=list(LEFT_OUT))
        known = any((directory / name).exists() for name in ("config.json", "adapter_config.json"))
        if hub_constants.HF_HUB_OFFLINE and not known:
            raise OfflineModeIsEnabled
        return directory


def _lacking(ref: ModelRef) -> list[str]:
    """What the cache lacks of a model that it holds a part of, as after a download that broke off; empty
    where it holds nothing."""
    folder = Path(hub_constants.HF_HUB_CACHE) / repo_folder_name(repo_id=ref.model, repo_type="model")
    commit = ref.revision or "main"
    with contextlib.suppress(OSError, ValueError):
        commit = (folder / "refs" / commit).read_text(encoding="utf-8").strip()
    snapshot = folder / "snapshots" / commit
    if not snapshot.is_dir() and not (folder / "refs" / (ref.revision or "main")).is_file():
        return []
    names = ("config.json", *_shards(snapshot))
    lacking = [name for name in names if not (snapshot / name).is_file()]
    return lacking if has_tokenizer(snapshot) else [*lacking, "the files of the tokenizer"]


def _only_cached(ref: ModelRef, files: ModelFiles) -> ModelFiles:
    """The same with the hint for a client that is offline, and so does not fetch the rest."""
    hint = f"only a part of {ref.model} is in the cache: {_ONLINE}, and the rest is fetched"
    return replace(
        files,
        problems=tuple(
            replace(one, hint=hint) if one.kind in ("no-weights", "missing-shard", "no-tokenizer") else one
            for one in files.problems
        ),
    )


def _fetched_again(ref: ModelRef, files: ModelFiles) -> ModelFiles:
    """The same with a hint that helps for a broken shard: one that is in the cache is not fetched again."""

    def hint(shard: str) -> str:
        words = ["hf", "download", ref.model, shard, "--force-download"]
        return shlex.join([*words, *(("--revision", ref.revision) if ref.revision is not None else ())])

    return replace(
        files,
        problems=tuple(
            replace(one, hint=hint(one.subject)) if one.kind in ("truncated-shard", "corrupt-shard") else one
            for one in files.problems
        ),
    )


def _snapshot(
    ref: ModelRef, allow: Sequence[str], progress: Progress | None, ignore: list[str] | None = None
) -> Path:
    extra: dict[str, Any] = {} if progress is None else {"tqdm_class": _bar(progress)}
    return Path(
        snapshot_download(
            ref.model, revision=ref.revision, allow_patterns=list(allow), ignore_patterns=ignore, **extra
        )
    )


def _shards(directory: Path) -> tuple[str, ...]:
    """The weight files to fetch: those in the index, or the single file."""
    if not (directory / INDEX).is_file():
        return (SINGLE,)
    try:
        names = sorted(set(index_map(read_json(directory / INDEX)).values()))
    except ValueError:
        return (SINGLE,)
    return tuple(name for name in names if not unsafe_path(name) and name.endswith(".safetensors")) or (
        SINGLE,
    )


def _bytes_to_come(directory: Path, shards: Sequence[str]) -> int:
    """Of the shards that are not there yet, by the size of all that the index names; 0 without one."""
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
        size = int(read_json(directory / INDEX)["metadata"]["total_size"])
        return size - sum((directory / name).stat().st_size for name in shards if (directory / name).exists())
    return 0


def _announced(progress: Progress, expected: int) -> Progress:
    """`progress` with all that is expected: `snapshot_download` learns the size of a file when it begins with
    it, and says nothing before the first 10 MB."""
    if expected > 0:
        progress(0, expected)
    return lambda done, total: progress(done, max(total or 0, expected, done) or None)


def _commit(directory: Path) -> str | None:
    """The commit, after which the Hub's cache names the folder of a snapshot."""
    return directory.name if directory.parent.name == "snapshots" else None


def _remote_tensors(ref: ModelRef, files: ModelFiles) -> ModelFiles:
    """The tensors, from headers read over the network: a few kilobytes per shard."""
    try:
        with _explained(ref):
            remote = get_safetensors_metadata(ref.model, revision=ref.revision)
    except NotASafetensorsRepoError:
        return _name_pickles(ref, files)
    except SafetensorsParsingError as error:
        problem = SourceProblem("corrupt-shard", ref.model, f"a shard of {ref.model} cannot be read: {error}")
        return replace(files, problems=(*files.problems, problem))
    tensors = []
    for shard, metadata in sorted(remote.files_metadata.items()):
        for name, info in sorted(metadata.tensors.items(), key=lambda item: item[1].data_offsets):
            begin, end = info.data_offsets
            dtype = DTYPES[info.dtype][0] if info.dtype in DTYPES else str(info.dtype).lower()
            tensors.append(TensorInfo(name, tuple(info.shape), dtype, end - begin, shard))
    return without_weight_files(files, tensors)


def _name_pickles(ref: ModelRef, files: ModelFiles) -> ModelFiles:
    """Replace the problem "no-weights" by the pickles that the repository has, where the Hub can be asked."""
    try:
        names = HfApi().list_repo_files(ref.model, revision=ref.revision)
    except (HfHubHTTPError, OSError) as error:
        if is_out_of_memory(error):
            raise
        return files
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if not pickles:
        return files
    problem = SourceProblem(
        "pickled-weights",
        pickles[0],
        f"{ref.model} has pickled weights only ({', '.join(pickles[:3])}); a pickle can run any program "
        "when it is opened, so only safetensors files are read",
        "look for a conversion among the model's pull requests on the Hub (--revision refs/pr/N), "
        "or convert it in an environment where running its code is safe",
    )
    return replace(files, problems=(*(p for p in files.problems if p.kind != "no-weights"), problem))


@contextlib.contextmanager
def _explained(ref: ModelRef) -> Iterator[None]:
    """Turn exceptions of `huggingface_hub` into a `ModelError` that says what to do."""
    what = ref.model if ref.revision is None else f"{ref.model} at {ref.revision}"
    try:
        yield
    except GatedRepoError as error:
        raise ModelError(
            f"{what} is gated: the Hub requires a login",
            hint="accept its licence on the Hub, then set HF_TOKEN",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"no such directory, and no such model on the Hub: {what}",
            hint="check the spelling; a private model needs HF_TOKEN, a local one the path of its directory",
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"{ref.model} on the Hub has no revision {ref.revision or 'main'}",
            hint="give --revision a branch, a tag or a commit of it, or leave it out",
        ) from error
    except HFValidationError as error:
        raise ModelError(f"no such directory, and not a valid Hub model id: {ref.model}") from error
    except NotASafetensorsRepoError:
        raise
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
        if isinstance(error.__cause__, HfHubHTTPError):  # it was reached, and refused
            raise _refused(what, error.__cause__) from error
        if lacking := _lacking(ref):
            raise ModelError(
                f"only a part of {what} is in the cache, and the Hub cannot be reached; there is no "
                f"{names_text(lacking, 3)}",
                hint=f"{_ONLINE}: the rest is fetched; or give the path of a local model directory",
            ) from error
        raise ModelError(
            f"no such directory: {ref.model}; as a Hub model id it is not in the cache, "
            "and the Hub cannot be reached",
            hint="connect to the network, unset HF_HUB_OFFLINE, or give the path of a local model directory",
        ) from error
    except HfHubHTTPError as error:
        raise _refused(what, error) from error
    except json.JSONDecodeError as error:
        raise ModelError(
            f"what came for {what} is not an answer of the Hub: {first_line(error)}",
            hint="check HF_ENDPOINT; a proxy or the login page of a network may have answered in its place",
        ) from error
    except OSError as error:
        if is_out_of_memory(error):
            raise
        if error.errno is None:
            raise _broken_off(what, error) from error
        raise _not_kept(what, error) from error
    except Exception as error:
        if not type(error).__module__.startswith(_HTTP_CLIENTS):
            raise
        if _lacking(ref):
            raise _broken_off(what, error) from error
        raise ModelError(
            f"no such directory: {ref.model}; as a Hub model id it cannot be fetched: {first_line(error)}",
            hint="check the network, or give the path of a local model directory",
        ) from error


def _refused(what: str, error: HfHubHTTPError) -> ModelError:
    return ModelError(
        f"the Hub answered for {what}: {first_line(error)}",
        hint="the token is not accepted, or may not read this: set HF_TOKEN to one that may"
        if error.response.status_code in _NOT_ALLOWED
        else "try again later: files that are complete are kept",
    )


def _not_kept(what: str, error: OSError) -> ModelError:
    where = str(error.filename or hub_constants.HF_HUB_CACHE)
    if where == hub_constants.HF_TOKEN_PATH:
        return ModelError(
            f"the Hub's token cannot be read: {reason(error)}: {shown(where)}",
            hint="make it readable, or set HF_TOKEN",
        )
    hint = None
    if error.errno in _FULL:
        hint = "make room there, or set HF_HUB_CACHE to a directory with room"
    elif error.errno in _CLOSED:
        hint = "set HF_HUB_CACHE to a directory that you may read and write"
    return ModelError(f"{what} cannot be kept in the Hub's cache: {reason(error)}: {shown(where)}", hint=hint)


def _broken_off(what: str, error: Exception) -> ModelError:
    return ModelError(
        f"the download of {what} broke off: {first_line(error)}",
        hint="check the network, and run the same command again: files that are complete are kept",
    )


def _bar(progress: Progress) -> type:
    """A silent progress bar for `snapshot_download` that reports bytes to `progress`, one thread at a time.

    It makes one bar of bytes from the network and one of bytes on the disk: the one that is ahead counts.
    """
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    one_at_a_time, of_bytes = threading.Lock(), []

    class Reporting(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **(kwargs | {"disable": True}))
            self.counts_bytes = kwargs.get("unit") == "B"
            if self.counts_bytes:
                of_bytes.append(self)

        def update(self, n: float | None = 1) -> None:
            with one_at_a_time:
                self.n += n or 0
                if self.counts_bytes:
                    totals = [int(bar.total) for bar in of_bytes if bar.total]
                    progress(int(max(bar.n for bar in of_bytes)), max(totals, default=None))

    return Reporting
