"""The model's files where not all ranks see them: rank 0 reads them for those that do not.

A rank opens MODEL by its own means: a directory, or the Hub and its cache. Where it finds no weights, rank 0
sends it what a skeleton is made of: config.json, the code of the repository, the names and shapes of the
tensors. Their bytes follow block by block (`model.shards`). A rank that finds other files than rank 0 is an
error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from gptq_cli.config import ModelRef
from gptq_cli.errors import GptqError, ModelError
from gptq_cli.events import Observer, Warned
from gptq_cli.model.find import find_model, local_directory
from gptq_cli.model.shards import ReceivedShards, SentShards, ShardFiles, Shards
from gptq_cli.model.skeleton import Skeleton
from gptq_cli.model.source import ModelFiles, scan_directory
from gptq_cli.model.source_files import defining_files
from gptq_cli.placement.device import format_size
from gptq_cli.ranks.joining import Joined, Member
from gptq_cli.ranks.team import Team, decided_elsewhere
from gptq_cli.wording import names_text

MAX_NAMED = 3


@dataclass(frozen=True, slots=True)
class SentFiles:
    """A model's files as rank 0 describes them."""

    listed: ModelFiles
    contents: tuple[tuple[str, bytes], ...]
    """Names and contents of the files that a skeleton is made from."""


@dataclass(frozen=True, slots=True)
class SeenFiles:
    """What a rank that follows goes by."""

    files: ModelFiles
    shards: Shards | None
    """None: it reads the files by itself."""


def send_files(own: Joined, skeleton: Skeleton, observer: Observer) -> Shards | None:
    """Rank 0: find out who does not see the model's files, and send them. None where all see them."""
    blind = _blind(own.team, "")
    if not blind:
        return None
    files = skeleton.files
    members = [own.members[rank] for rank in blind]
    observer(_warning(files, members, next(iter(blind.values()))))
    own.team.decided(lambda: _described(files, code=skeleton.ref.trust_remote_code))
    channel = own.team.channel(tuple(blind))
    return None if channel is None else SentShards(ShardFiles(files.directory, files.stamps), channel)


@contextmanager
def seen_files(team: Team, ref: ModelRef, revision: str | None) -> Iterator[SeenFiles]:
    """The others: the model's files, or what rank 0 sends of them. `revision`: the commit that rank 0 has;
    None where it has a directory."""
    found, problem = _own_files(ref, revision)
    blind = _blind(team, problem)
    if not blind:
        yield SeenFiles(_there(found), None)
        return
    sent: SentFiles = team.decided(decided_elsewhere)
    channel = team.channel(tuple(blind))
    if channel is None:
        yield SeenFiles(_there(found), None)
        return
    with TemporaryDirectory(prefix="gptq-") as folder:
        for name, content in sent.contents:
            (Path(folder) / name).write_bytes(content)
        yield SeenFiles(replace(sent.listed, directory=Path(folder), shards=()), ReceivedShards(channel))


def _own_files(ref: ModelRef, revision: str | None) -> tuple[ModelFiles | None, str]:
    """The files of the model on this machine, or why it has none. Where rank 0 has a directory (no
    `revision`), the Hub is not asked for a model that happens to have its name."""
    try:
        if revision is None and local_directory(ref.model, ModelError) is None:
            return None, "no such directory"
        files = find_model(replace(ref, revision=revision))
    except ModelError as error:
        return None, error.message
    if files.tensors:
        return files, ""
    return None, next((problem.message for problem in files.problems), "it has no weights")


def _blind(team: Team, problem: str) -> dict[int, str]:
    """The ranks without the model's files, and why. All ranks ask at the same point."""
    return {rank: why for rank, why in enumerate(team.gathered(problem)) if why}


def _described(files: ModelFiles, *, code: bool) -> SentFiles:
    directory = files.directory
    listed = scan_directory(directory, source=files.source)  # as stored: few bits are not decoded yet
    contents = tuple((name, (directory / name).read_bytes()) for name in defining_files(directory, code=code))
    return SentFiles(replace(listed, revision=files.revision, stamps=()), contents)


def _warning(files: ModelFiles, members: Sequence[Member], why: str) -> Warned:
    who = names_text([str(member) for member in members], MAX_NAMED)
    one = len(members) == 1
    return Warned(
        f"{who} {'does' if one else 'do'} not see {files.source} ({why}): rank 0 sends "
        f"{'it' if one else 'them'} the weights, up to {format_size(files.size_bytes)}",
        "a file system that all machines see, or a copy at the same path on each, is faster",
    )


def _there(files: ModelFiles | None) -> ModelFiles:
    if files is None:
        raise GptqError("a rank without the model's files was not sent any")
    return files
