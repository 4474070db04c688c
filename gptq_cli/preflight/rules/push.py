"""Rules about an upload to the Hub: asked before the work, because the upload comes at its end."""

from __future__ import annotations

from gptq_cli.results.push import HubState
from gptq_cli.rules import Remark, rule


@rule("error")
def push_id(case: HubState) -> list[Remark]:
    """The id that the checkpoint is to be uploaded to is not one that the Hub allows: `user/name`."""
    if not case.invalid:
        return []
    return [_remark(case, f"{case.repo_id!r} is not a Hub id: {case.invalid}", "give it as user/name")]


@rule("error")
def push_offline(case: HubState) -> list[Remark]:
    """An upload is asked for, and `HF_HUB_OFFLINE` forbids every request to the Hub."""
    if not case.offline:
        return []
    return [_remark(case, "HF_HUB_OFFLINE is set, so nothing can be uploaded", "unset HF_HUB_OFFLINE")]


@rule("error")
def push_token(case: HubState) -> list[Remark]:
    """An upload is asked for, and there is no token that says who uploads."""
    if case.has_token:
        return []
    return [_remark(case, "there is no token for the Hub", "hf auth login, or set HF_TOKEN")]


@rule("error")
def push_read_only(case: HubState) -> list[Remark]:
    """An upload is asked for, and the token may only read."""
    if not case.read_only:
        return []
    hint = "make a token that may write at https://huggingface.co/settings/tokens, and set HF_TOKEN to it"
    return [_remark(case, "the token for the Hub may read and not write", hint)]


@rule("error")
def push_unreachable(case: HubState) -> list[Remark]:
    """An upload is asked for, and the Hub cannot be reached or does not accept the token."""
    if not case.unreachable:
        return []
    hint = "check the network, HF_ENDPOINT and HF_TOKEN; a checkpoint can be uploaded later: gptq push DIR"
    return [_remark(case, f"the Hub cannot be asked: {case.unreachable}", hint)]


@rule("error")
def push_namespace(case: HubState) -> list[Remark]:
    """The repository does not exist, and the token's owner cannot make one under that name."""
    owner = case.repo_id.partition("/")[0]
    if case.exists or not case.namespaces or owner in case.namespaces:
        return []
    known = ", ".join(case.namespaces)
    return [_remark(case, f"{owner} is not the token's user or organisation; available: {known}", "")]


@rule("error")
def push_visibility(case: HubState) -> list[Remark]:
    """`--private` is asked for, and the repository exists and is public: the upload would be public."""
    if not (case.private and case.exists and not case.is_private):
        return []
    hint = "give another id, or make the repository private on the Hub first"
    return [_remark(case, "the repository exists and is public, but --private is given", hint)]


@rule("error")
def push_other_model(case: HubState) -> list[Remark]:
    """The repository holds weights that are not a GPTQ checkpoint: an upload would mix two models."""
    if not case.holds_other_weights:
        return []
    return [_remark(case, "the repository holds another model's weights", "give another id")]


def _remark(case: HubState, message: str, hint: str) -> Remark:
    return Remark(subject=case.repo_id, message=message, hint=hint)
