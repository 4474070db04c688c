"""Checks of a model directory's files before they are opened: regular, inside the directory, unchanged.

An untrusted directory may hold more than files. Three questions are asked about every name that is read or
copied:

    is it a regular file?    a pipe blocks its reader for ever, a device may have no end: neither is opened
    is it inside?            a link is followed within the directory, or into the blobs of the same repository
                             in a Hub cache; elsewhere it could point to any file of the user's
    is it unchanged?         a run takes hours, and all that it reads must belong to the same model

For the last one, a `FileStamp` records each file when the source is opened. Size and modification time must
stay the same. For small files the digest of the content is recorded and decides alone: a `touch` is not a
change. For weights, which are too large to be read twice, the digest of a sample is recorded. It decides
where only the inode or the status time differs (a hard link was made, the mode was changed, a network drive
renumbered its files).
"""

from __future__ import annotations

import errno
import hashlib
import os
import shlex
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from io import BufferedReader
from pathlib import Path, PurePosixPath, PureWindowsPath

from gptq_cli.errors import SourceChanged
from gptq_cli.wording import number_of

_FOR_PEOPLE = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
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
    *_FOR_PEOPLE,
)
"""Names of the small files that go into a checkpoint as they are."""
COPIED_FOLDERS = ("additional_chat_templates",)
CODE = "*.py"
CONFIGS = ("config.json", "quantize_config.json", "quant_config.json")
_READ = (*COPIED, CODE, "*.json")
"""Names that this tool or Transformers may open, weights aside."""
_LFS = b"version https://git-lfs.github.com/spec/"
"""How a pointer of Git LFS begins, which stands in the place of a file."""
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
"""An upper bound on the files of tokenizers."""
_SETTINGS_BYTES = 8_000_000
_WHOLE_BYTES = 64 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 14


class NotRegularError(OSError):
    """A pipe, a socket or a device where a file should be. `strerror` says which."""


@dataclass(frozen=True, slots=True)
class FileStamp:
    """The state of a file when the source was opened."""

    name: str
    """Its path below the directory."""
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    digest: bytes
    """Of the content, or of a sample of it."""
    whole: bool
    """True: the digest is of the complete content."""


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


def link_to_nothing(path: Path) -> str:
    """What is said of a link without a file at its end; "" for anything else."""
    if not os.path.islink(path) or os.path.exists(path):
        return ""
    return f"is a link to {os.readlink(path)}, which is not there"


def is_pointer(path: Path) -> bool:
    """Whether a pointer of Git LFS stands in the place of a file."""
    try:
        with open_regular(path) as file:
            return file.read(len(_LFS)) == _LFS
    except (OSError, ValueError):
        return False


def content_elsewhere(path: Path) -> tuple[str, str] | None:
    """What stands in the place of a file that was not fetched, and what to do; None where it is there."""
    if nothing := link_to_nothing(path):
        return nothing, "put the file there, or fetch the model again"
    if not is_pointer(path):
        return None
    folder = shlex.quote(str(path.parent))
    return (
        "is a pointer of Git LFS, not the file itself",
        f"git -C {folder} lfs pull fetches it; or fetch the model again",
    )


def unsafe_path(name: str) -> bool:
    """True for a shard name that could leave the directory: absolute, with `..`, a drive, a backslash or a
    NUL."""
    pure = PurePosixPath(name)
    return (
        not name
        or pure.is_absolute()
        or ".." in pure.parts
        or "\\" in name
        or "\0" in name
        or bool(PureWindowsPath(name).drive)
    )


def outside_target(directory: Path, name: str) -> str | None:
    """The real path of `name` where a link leads out of `directory`; None where it stays inside.

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
    """Names of all files beside the weights that may be opened, sorted; directories are not among them, but a
    link to nothing in the place of one is."""
    for path in sorted(directory.iterdir()):
        if _like(path.name, _READ) and not path.is_dir():
            yield path.name
    for folder in COPIED_FOLDERS:
        if (directory / folder).is_dir():
            for path in sorted((directory / folder).glob("*.jinja")):
                yield f"{folder}/{path.name}"
        elif link_to_nothing(directory / folder):
            yield folder


def defining_files(directory: Path, *, code: bool) -> tuple[str, ...]:
    """Names of the files that a model without weights is built from; Python files with `code`."""
    return tuple(
        name for name in small_files(directory) if name in CONFIGS or (code and _like(name, (CODE,)))
    )


def has_tokenizer(directory: Path) -> bool:
    """Whether a file is there that a tokenizer may be made of, its code included."""
    return any(
        path.is_file() for name in (*TOKENIZER_FILES, _TOKENIZER_CODE) for path in directory.glob(name)
    )


def oversize(directory: Path, name: str) -> tuple[int, int] | None:
    """(bytes, bytes allowed) of a small file that is larger than any of its kind should be; else None.

    Parsed, a JSON text takes up to twenty times its size, so files that Transformers will parse are limited.
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
    return name in COPIED_FOLDERS or _like(name, COPIED) or (code and _like(name, (CODE,)))


def is_needed(name: str) -> bool:
    """True for a file that is part of the model itself."""
    return _like(name.rpartition("/")[2], NEEDED)


def is_parsed(name: str) -> bool:
    """True for a file that a program reads if it is there: settings, a template, a vocabulary."""
    return is_copied(name, code=False) and not _like(name, _FOR_PEOPLE)


def _like(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def stamps_of(directory: Path, names: Iterable[str]) -> tuple[FileStamp, ...]:
    """Record the present state of the regular files among `names`."""
    found = []
    for name in dict.fromkeys(names):
        try:
            found.append(_stamp(directory, name))
        except (OSError, ValueError):
            continue  # missing or not a file: reported where it is needed
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
    """Raise `SourceChanged`, naming the file and the change, if a file has changed."""
    for stamp in stamps:
        change = _change(directory, stamp)
        if change is not None:
            raise SourceChanged(
                f"{stamp.name} in {directory} changed during the run: {change}",
                hint="nothing was written; do not change the model's files during a run, and start again "
                "(from a copy, or a Hub model id, if they keep changing)",
            )


def _change(directory: Path, stamp: FileStamp) -> str | None:
    """What has changed, as a clause; None where nothing has."""
    path = directory / stamp.name
    try:
        now = path.stat()
        if not stat.S_ISREG(now.st_mode):
            return f"it is {_special(now.st_mode) or 'not a file'} now"
        if now.st_size != stamp.size_bytes:
            return f"it had {number_of(stamp.size_bytes, 'byte')} and now has {now.st_size:,}"
        times = now.st_mtime_ns == stamp.mtime_ns
        weights = stamp.name.endswith(".safetensors")
        if times and (now.st_ctime_ns, now.st_ino) == (stamp.ctime_ns, stamp.inode):
            return None
        if weights and not times:
            return "it was written to (its modification time differs)"
        if _stamp(directory, stamp.name).digest != stamp.digest:
            return "its content differs" if times else "it was written to"
    except FileNotFoundError:
        return "it is gone"
    except OSError as error:
        return f"it can no longer be read ({error.strerror})"
    return None
