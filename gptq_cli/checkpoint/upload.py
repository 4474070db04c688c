"""Uploading a finished checkpoint to the Hub, in one commit: all of it appears at once, or nothing does.

An upload that was interrupted goes on when it is run again: files that the Hub has already are not sent a
second time. `HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` are honoured by `huggingface_hub`.
report.json and pages made of it stay here: they name this machine and its paths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented there

from gptq_cli import __version__
from gptq_cli.errors import GptqError
from gptq_cli.results.card import CARD, renamed
from gptq_cli.results.push import HubState, PushConfig

_LEFT_OUT = [".*", "*/.*", "report.json", "*.html", "*.htm"]
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
_HTTP_CLIENTS = ("httpx", "httpcore")


def look(push: PushConfig) -> HubState:
    """Ask the Hub what an upload would find; changes nothing there."""
    state = HubState(repo_id=push.repo_id, private=push.private)
    try:
        validate_repo_id(push.repo_id)
    except HFValidationError as error:
        return replace(state, invalid=" ".join(str(error).split()))
    if push.repo_id.count("/") != 1:
        return replace(state, invalid="it has no user or organisation in front of a slash")
    if hub_constants.HF_HUB_OFFLINE:
        return replace(state, offline=True)
    try:
        if get_token() is None:
            return replace(state, has_token=False)
        api = HfApi()
        user = api.whoami()
        state = replace(
            state,
            namespaces=(str(user["name"]), *(str(one["name"]) for one in user.get("orgs", ()))),
            read_only=reads_only(user),
        )
        info = api.model_info(push.repo_id)
    except RepositoryNotFoundError:
        return state
    except Exception as error:  # noqa: BLE001  # `_said` raises again what is not of the network
        return replace(state, unreachable=_said(error))
    names = [file.rfilename for file in info.siblings or ()]
    weights = any(name.endswith((".safetensors", ".bin", ".gguf", ".pt", ".pth")) for name in names)
    return replace(
        state,
        exists=True,
        is_private=bool(info.private),
        holds_other_weights=weights and "quantize_config.json" not in names,
    )


def reads_only(user: Mapping[str, Any]) -> bool:
    """Whether the token of `user` (what `whoami` says) may write nowhere; False where that is not said."""
    token = (user.get("auth") or {}).get("accessToken") or {}
    granted = token.get("fineGrained")
    if token.get("role") == "fineGrained" and isinstance(granted, Mapping):
        scopes = [
            granted.get("global") or (),
            *(x.get("permissions") or () for x in granted.get("scoped") or ()),
        ]
        return not any("write" in str(permission) for scope in scopes for permission in scope)
    return bool(token.get("role") == "read")


def upload(directory: Path, push: PushConfig) -> str:
    """Upload the checkpoint in `directory`; return the address of the commit.

    The repository is made where there is none. Weights of an earlier checkpoint in it that have no file of
    the same name now are removed by the same commit. Raises `GptqError`.
    """
    try:
        api = HfApi()
        api.create_repo(push.repo_id, private=push.private or None, exist_ok=True)
        with _as_uploaded(directory, push.repo_id) as folder:
            commit = api.upload_folder(
                repo_id=push.repo_id,
                folder_path=folder,
                commit_message=f"GPTQ checkpoint of gptq-cli {__version__}",
                ignore_patterns=_LEFT_OUT,
                delete_patterns=_WEIGHTS,
            )
    except Exception as error:
        raise GptqError(f"the upload to {push.repo_id} did not succeed: {_said(error)}") from error
    return str(commit.commit_url)


@contextmanager
def _as_uploaded(directory: Path, name: str) -> Iterator[Path]:
    """A folder of links to the files of `directory`, with a card whose commands are about `name`."""
    with TemporaryDirectory(prefix="gptq-upload-") as made:
        folder = Path(made)
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                link = folder / path.relative_to(directory)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.resolve())
        card = folder / CARD
        if card.exists():
            text = card.read_text(encoding="utf-8", errors="surrogateescape")
            card.unlink()
            card.write_text(renamed(text, name), encoding="utf-8", errors="surrogateescape")
        yield folder


def _said(error: Exception) -> str:
    """What the network or the Hub said, in one line; any other error is raised again."""
    known = isinstance(error, HfHubHTTPError | OSError | ValueError)
    if not (known or type(error).__module__.startswith(_HTTP_CLIENTS)):
        raise error
    return " ".join(str(error).split()) or type(error).__name__
