"""The part of a model that reads and writes text, and the towers beside it.

A model of images or sound and text is a text decoder beside other towers, whose outputs it takes in place of
some tokens. Only the decoder is quantized, and text alone goes through it. Nothing here knows architectures:
the decoder is what the model itself names (`get_decoder`), and it holds the embedding of the tokens; another
`PreTrainedModel` beside it, or one inside it that has no such embedding, is a tower.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from gptq_cli.placement.names import parents


def language_model(model: Any) -> Any:
    """The smallest part of `model` that generates text by itself: nearly always `model`.

    Some classes wrap a complete language model with a head of its own. They refuse to run without an image
    (BLIP-2, Kosmos-2), or cannot run at all, because they are several generators (Qwen-Omni's thinker and
    talker); that language model runs on text alone. It holds the embedding of the tokens that the whole model
    names; where it names none, it has the text config of the whole model.
    """
    embedding = _own_embedding(model)
    found = model
    for module in model.modules():
        if module is model or not isinstance(module, PreTrainedModel) or not module.can_generate():
            continue
        if module.get_output_embeddings() is None:
            continue
        if embedding is None:
            fits = module.config.get_text_config() is model.config.get_text_config()
        else:
            fits = any(item is embedding for item in module.modules())
        if fits:
            found = module
    return found


def token_embedding(model: Any) -> nn.Module | None:
    """The embedding of the tokens; None where the model names none."""
    return _own_embedding(model) or _own_embedding(language_model(model))


def _own_embedding(model: Any) -> nn.Module | None:
    get = getattr(model, "get_input_embeddings", None)
    try:
        embedding = get() if callable(get) else None
    except NotImplementedError:  # Transformers' word for "not known"
        return None
    return embedding if isinstance(embedding, nn.Module) else None


def output_head(model: Any) -> nn.Module | None:
    """The linear that makes logits: the model's, or that of its language model."""
    for owner in (model, language_model(model)):
        get = getattr(owner, "get_output_embeddings", None)
        head = get() if callable(get) else None
        if isinstance(head, nn.Module):
            return head
    return None


def text_decoder(model: nn.Module) -> nn.Module:
    """The decoder that the model names; `model` itself where it names none.

    Where what it names is its head (ModernBERT's `decoder` makes the logits), its base model.
    """
    text = language_model(model)
    get = getattr(text, "get_decoder", None)
    decoder = get() if callable(get) else model
    if decoder is output_head(model):
        decoder = text.base_model
    return decoder if isinstance(decoder, nn.Module) else model


def text_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the text decoder and everything in it, without towers inside it."""
    decoder, towers = text_decoder(model), _towers_in_decoder(model)
    inside = {id(module) for module in decoder.modules()}
    for tower in towers:
        inside -= {id(module) for module in tower.modules()}
    yield from ((name, module) for name, module in model.named_modules() if id(module) in inside)


def _towers_in_decoder(model: nn.Module) -> list[nn.Module]:
    """Models inside the decoder without the embedding of the tokens, such as GIT's image encoder."""
    decoder, embedding = text_decoder(model), token_embedding(model)
    if embedding is None or all(module is not embedding for module in decoder.modules()):
        return []
    return [
        module
        for module in decoder.modules()
        if module is not decoder
        and isinstance(module, PreTrainedModel)
        and all(item is not embedding for item in module.modules())
    ]


def uncalled_tensors(model: nn.Module, blocks: Iterable[str], *, head: bool) -> frozenset[str]:
    """Names of the tensors outside the `blocks` that a forward on text up to the last of these, or with
    `head` to its end, does not use: a head that stays dense, a tower. They need not be in memory."""
    called = {id(module) for module in _run_on_text(model, head=head)}
    owners = dict(model.named_modules(remove_duplicate=False))
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    inside = frozenset(blocks)
    free: dict[int, list[str]] = {}
    used: set[int] = set()
    for name, tensor in tensors:
        if id(owners[name.rpartition(".")[0]]) in called or not inside.isdisjoint(parents(name)):
            used.add(id(tensor))
        else:
            free.setdefault(id(tensor), []).append(name)
    return frozenset(name for tensor, names in free.items() if tensor not in used for name in names)


def _run_on_text(model: nn.Module, *, head: bool) -> list[nn.Module]:
    text = language_model(model)
    towers = {id(module) for tower in beside_the_text(model).values() for module in tower.modules()}
    if not head and (last := output_head(model)) is not None:
        towers |= {id(module) for module in last.modules()}
    return [module for module in (text if head else text.base_model).modules() if id(module) not in towers]


def beside_the_text(model: nn.Module) -> dict[str, nn.Module]:
    """The largest modules that hold neither the text decoder, nor the head, nor a part of them: towers,
    projectors. Empty for a model of text alone."""
    text = {id(module) for _, module in text_modules(model)}
    head = output_head(model)
    text |= {id(module) for module in head.modules()} if head is not None else set()
    found: dict[str, nn.Module] = {}
    waiting = [("", model)]
    while waiting:
        prefix, module = waiting.pop()
        for name, child in module.named_children():
            full = f"{prefix}.{name}" if prefix else name
            if all(id(item) not in text for item in child.modules()):
                if any(True for _ in child.parameters()):
                    found[full] = child
            elif id(child) not in text or any(id(item) not in text for item in child.modules()):
                waiting.append((full, child))
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))
