"""The files of a model's directory, before one is opened: regular, inside, and still what they were.

A directory from a stranger may hold more than files. Three questions are asked of every name that is read or
copied:

    is it a regular file?    a pipe blocks its reader for ever, a device may have no end: neither is opened
    does it lie inside?      a link is followed within the directory, or into the blobs of the same repository
                             of a hub cache; anywhere else it would carry a stranger's choice of file along
    is it what it was?       a run takes hours, and what it read first must belong to what it reads last

For the last one, a `FileStamp` notes each file when the source is opened. Size and time of change must stay.
Small files are noted with their content, which alone decides about them: a `touch` is no change. Of weights,
too large to be read twice, a sample is noted, which decides where only the inode or the time of its status
differs (a hard link was made, the mode was changed, a network drive numbered its files anew).
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from io import BufferedReader
from pathlib import Path

from gptq_cli.errors import SourceChanged

COPIED = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "generation_config.json",
    "chat_template*",
    "*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Names of the small files that go into a checkpoint as they are."""
COPIED_FOLDERS = ("additional_chat_templates",)
CODE = "*.py"
CONFIGS = ("config.json", "quantize_config.json", "quant_config.json")
_READ = (*COPIED, CODE, "*.json")
"""Names that this tool or Transformers may open, weights aside."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "*.tiktoken",
)
"""Names of which one is enough for a tokenizer."""
_TOKENIZER_CODE = "tokenization_*.py"
NEEDED = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    *TOKENIZER_FILES,
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Names without which a model is another one; what else is copied may be left out."""
COPIED_BYTES = 200_000_000
"""No tokenizer is larger."""
_SETTINGS_BYTES = 8_000_000
_WHOLE_BYTES = 64 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 14


class NotRegularError(OSError):
    """A pipe, a socket or a device where a file should be. `strerror` says which."""


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What a file was when the source was opened."""

    name: str
    """Its path below the directory."""
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    digest: bytes
    """Of the content, or of a sample of it."""
    whole: bool
    """The digest is that of the whole content."""


def special_kind(path: Path) -> str | None:
    """ "a named pipe", "a socket", "a device" for what must not be opened; None for anything else. Follows
    links."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return None
    return _special(mode)


def _special(mode: int) -> str | None:
    if stat.S_ISFIFO(mode):
        return "a named pipe"
    if stat.S_ISSOCK(mode):
        return "a socket"
    return "a device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else None


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading, and nothing else. Raises `NotRegularError` and `OSError`."""
    if (kind := special_kind(path)) is not None:
        raise NotRegularError(errno.EINVAL, f"it is {kind}, not a file", str(path))
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:  # it may have been replaced since
        if (kind := _special(os.fstat(handle).st_mode)) is not None:
            raise NotRegularError(errno.EINVAL, f"it is {kind}, not a file", str(path))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def outside_target(directory: Path, name: str) -> str | None:
    """Where `name` really lies, if a link leads it out of `directory`; None where it stays inside.

    Inside is the directory's own real path and, for a snapshot of a hub cache (`models--org--name/snapshots/
    COMMIT`), the blobs of the same repository. Every link on the way counts, whatever its spelling.
    """
    root = os.path.realpath(directory)
    target = os.path.realpath(directory / name)
    if target == root or target.startswith(root.rstrip(os.sep) + os.sep):
        return None
    blobs = _blobs_of(Path(root))
    if blobs is not None and os.path.dirname(target) == blobs:
        return None
    return target


def _blobs_of(root: Path) -> str | None:
    """The blob folder of the repository whose snapshot (or a folder in it) `root` is."""
    for parent in (root, *root.parents):
        repository = parent.parent.parent
        if parent.parent.name == "snapshots" and repository.name.startswith("models--"):
            blobs = os.path.join(repository, "blobs")
            return blobs if os.path.realpath(blobs) == blobs else None
    return None


def small_files(directory: Path) -> Iterator[str]:
    """Names of everything beside the weights that may be opened, in order; no directory is among them."""
    for path in sorted(directory.iterdir()):
        if _like(path.name, _READ) and not path.is_dir():
            yield path.name
    for folder in COPIED_FOLDERS:
        if (directory / folder).is_dir():
            for path in sorted((directory / folder).glob("*.jinja")):
                yield f"{folder}/{path.name}"


def has_tokenizer(directory: Path) -> bool:
    """Whether a file is there that a tokenizer may be made of, its code included."""
    return any(
        path.is_file() for name in (*TOKENIZER_FILES, _TOKENIZER_CODE) for path in directory.glob(name)
    )


def oversize(directory: Path, name: str) -> tuple[int, int] | None:
    """(bytes, bytes allowed) of a small file that is larger than any of its kind; None where it is not.

    Parsed, a JSON text takes up to twenty times its bytes, so what Transformers reads into Python is bounded.
    """
    kinds = {
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "generation_config.json",
    }
    if name.endswith(".safetensors") or name.endswith(".index.json"):
        return None
    allowed = _SETTINGS_BYTES if name in kinds or name.startswith("chat_template") else COPIED_BYTES
    try:
        size = (directory / name).stat().st_size
    except (OSError, ValueError):
        return None
    return (size, allowed) if size > allowed and (name in kinds or is_copied(name)) else None


def is_copied(name: str, *, code: bool = True) -> bool:
    """True for a small file (a name of `small_files`) that goes into a checkpoint; Python files with
    `code`."""
    folder, _, rest = name.rpartition("/")
    if folder:
        return folder in COPIED_FOLDERS and bool(rest)
    return _like(name, COPIED) or (code and _like(name, (CODE,)))


def is_needed(name: str) -> bool:
    """True for a file whose content makes the model what it is."""
    return _like(name.rpartition("/")[2], NEEDED)


def _like(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def stamps_of(directory: Path, names: Iterable[str]) -> tuple[FileStamp, ...]:
    """Note the regular files among `names`, as they are now."""
    found = []
    for name in dict.fromkeys(names):
        try:
            found.append(_stamp(directory, name))
        except (OSError, ValueError):
            continue  # missing or not a file: whoever needs it says so
    return tuple(found)


def _stamp(directory: Path, name: str) -> FileStamp:
    with open_regular(directory / name) as file:
        now = os.fstat(file.fileno())
        if not stat.S_ISREG(now.st_mode):
            raise NotRegularError(errno.EINVAL, "it is not a file", name)
        whole = now.st_size <= (_SAMPLES * _SAMPLE_BYTES if name.endswith(".safetensors") else _WHOLE_BYTES)
        digest = _digest(file, now.st_size, whole=whole)
    return FileStamp(name, now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino, digest, whole)


def _digest(file: BufferedReader, size: int, *, whole: bool) -> bytes:
    if whole:
        return hashlib.file_digest(file, "blake2b").digest()
    digest = hashlib.blake2b()
    for index in range(_SAMPLES):
        file.seek((size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
        digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()


def check_unchanged(directory: Path, stamps: Iterable[FileStamp]) -> None:
    """Raise `SourceChanged`, naming the file and what changed, unless every file is what it was."""
    for stamp in stamps:
        change = _change(directory, stamp)
        if change is not None:
            raise SourceChanged(
                f"{stamp.name} in {directory} changed while the run worked: {change}",
                hint="nothing was written; leave the model's files alone while a run works, and start again "
                "(from a copy, or a hub id, if they keep changing)",
            )


def _change(directory: Path, stamp: FileStamp) -> str | None:
    """What is different now, as a clause; None where nothing is."""
    path = directory / stamp.name
    try:
        now = path.stat()
        if not stat.S_ISREG(now.st_mode):
            return f"it is {_special(now.st_mode) or 'no file'} now"
        if now.st_size != stamp.size_bytes:
            return f"it had {stamp.size_bytes} bytes, it has {now.st_size}"
        times = now.st_mtime_ns == stamp.mtime_ns
        weights = stamp.name.endswith(".safetensors")
        if times and (now.st_ctime_ns, now.st_ino) == (stamp.ctime_ns, stamp.inode):
            return None
        if weights and not times:
            return "it was written to (its time of change differs)"
        if _stamp(directory, stamp.name).digest != stamp.digest:
            return "its content differs" if times else "it was written to"
    except FileNotFoundError:
        return "it is gone"
    except OSError as error:
        return f"it cannot be read any more ({error.strerror})"
    return None
