"""The model's directory, from a stranger or under somebody's hands: links, pipes, changes during the run,
configs and heads that ask for more than there is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig, QuantizeJob
from gptq_cli.errors import SourceChanged
from gptq_cli.events import BlockFinished, Event, PhaseFinished
from gptq_cli.jobs import load, quantize
from gptq_cli.load_job import LoadJob
from gptq_cli.model.find import find_model
from gptq_cli.model.skeleton import open_skeleton
from gptq_cli.model.source import INDEX
from gptq_cli.model.weights import load_resident
from gptq_cli.placement.device import Device
from gptq_cli.placement.device_map import DeviceMap
from gptq_cli.placement.placement import Placement, PlacementEntry
from tests.conftest import TinyFactory
from tests.e2e.commands import FAST, Ran, gptq, write_text

ON_CPU = Placement((PlacementEntry("", Device("cpu"), 1, True),), Device("cpu"), "test")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    write_text(tmp_path / "text.txt")
    (tmp_path / "secret").write_text("not for upload")
    return tmp_path


@pytest.fixture
def model(tiny_llama: Path, place: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, place / "model"))


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the model; tests change copies of it."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "out").mkdir()
    write_text(folder / "text.txt")
    ran = run(folder, tiny_llama)
    assert ran.code == 0, ran.stderr
    return folder / "out" / "q"


@pytest.fixture
def checkpoint(made: Path, place: Path) -> Path:
    return Path(shutil.copytree(made, place / "out" / "q"))


def run(place: Path, model: Path, *words: object) -> Ran:
    return gptq(
        "quantize", model, "--out", place / "out" / "q", "--calibration", place / "text.txt", *FAST, *words
    )


def refused(place: Path, ran: Ran, code: int, *says: str) -> None:
    assert ran.code == code, ran.stderr
    text = " ".join((ran.stdout + ran.stderr).split())
    for said in says:
        assert said in text
    assert len(ran.stderr) < 20_000
    assert "Traceback" not in ran.stderr
    assert list((place / "out").iterdir()) == []


# -- changes during the run


def other_weights(file: Path) -> None:
    tensors = load_file(file)
    save_file({name: torch.zeros_like(value) for name, value in tensors.items()}, file, {"format": "pt"})


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def append(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b" ")


CHANGES: list[tuple[str, Callable[[Path], object]]] = [
    ("model.safetensors", other_weights),
    ("model.safetensors", truncate),
    ("model.safetensors", Path.unlink),
    ("config.json", append),
    ("tokenizer.json", append),
    ("generation_config.json", append),
    ("LICENSE", append),
    ("LICENSE", Path.unlink),
]


def job(place: Path, model: Path) -> QuantizeJob:
    return QuantizeJob(
        model=ModelRef(model=str(model)),
        out=str(place / "out" / "q"),
        quantize=QuantizeConfig(group_size=32),
        calibration=CalibrationConfig.of(str(place / "text.txt"), samples=8, seq_len=48),
        device_map=DeviceMap.parse("cpu"),
    )


def at_block(number: int, do: Callable[[], object]) -> Callable[[Event], None]:
    def observe(event: Event) -> None:
        if isinstance(event, BlockFinished) and event.index == number:
            do()

    return observe


@pytest.mark.parametrize(("name", "change"), CHANGES)
@pytest.mark.parametrize("block", [0, 2])
def test_a_file_that_changes_ends_the_run(
    name: str, change: Callable[[Path], object], block: int, place: Path, model: Path
) -> None:
    (model / "LICENSE").write_text("do as you like")
    with pytest.raises(SourceChanged, match=name):
        quantize(job(place, model), at_block(block, lambda: change(model / name)))
    assert list((place / "out").iterdir()) == []


def test_a_shard_that_changes_ends_the_run(place: Path, tiny_llama_sharded: Path) -> None:
    model = Path(shutil.copytree(tiny_llama_sharded, place / "sharded"))
    last = sorted(model.glob("model-*.safetensors"))[-1]
    with pytest.raises(SourceChanged, match=last.name):
        quantize(job(place, model), at_block(0, lambda: other_weights(last)))
    with pytest.raises(SourceChanged, match=INDEX.replace(".", r"\.")):
        quantize(job(place, model), at_block(0, lambda: append(model / INDEX)))
    assert list((place / "out").iterdir()) == []


def test_what_comes_to_the_directory_is_not_copied(place: Path, model: Path) -> None:
    """It was not there when the links were judged."""
    (model / "config.json").touch()
    quantize(job(place, model), at_block(0, lambda: (model / "tokenizer_x").symlink_to(place / "secret")))
    assert (place / "out" / "q" / "config.json").is_file()
    assert not (place / "out" / "q" / "tokenizer_x").exists()


def test_a_resident_model_is_of_one_piece(model: Path) -> None:
    ref = ModelRef(model=str(model))
    skeleton = open_skeleton(find_model(ref), ref)
    loaded = load_resident(skeleton, ON_CPU)
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    data = (model / "model.safetensors").read_bytes()
    with (model / "model.safetensors").open("r+b") as file:  # in place: the mapped pages would change
        file.seek(len(data) // 8)
        file.write(b"\0" * (len(data) - len(data) // 8))
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())
    truncate(model / "model.safetensors")  # and these reads would end the process
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())
    with pytest.raises(SourceChanged, match=r"model\.safetensors"):
        load_resident(skeleton, ON_CPU)


def test_the_dense_model_of_load_and_the_checkpoint(
    place: Path, model: Path, checkpoint: Path, tiny_llama: Path
) -> None:
    asked = LoadJob(
        path=str(checkpoint), against=str(model), evaluate=str(place / "text.txt"), seq_len=32, windows=2,
        device_map=DeviceMap.parse("cpu"),
    )  # fmt: skip

    def when_loaded(file: Path) -> Callable[[Event], None]:
        def observe(event: Event) -> None:
            if isinstance(event, PhaseFinished) and event.phase == "open":
                other_weights(file)

        return observe

    with pytest.raises(SourceChanged, match=r"model\.safetensors"):
        load(asked, when_loaded(model / "model.safetensors"))
    shutil.copy(tiny_llama / "model.safetensors", model / "model.safetensors")
    with pytest.raises(SourceChanged, match=r"model\.safetensors"):
        load(asked, when_loaded(checkpoint / "model.safetensors"))


# -- links


def test_a_side_file_that_leads_out_is_left_out(place: Path, model: Path) -> None:
    (model / "tokenizer_x").symlink_to(place / "secret")
    (model / "LICENSE").symlink_to("../secret")
    (model / "NOTICE").symlink_to("config.json")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool.jinja").symlink_to(place / "secret")
    ran = run(place, model, "--progress", "plain")
    assert ran.code == 0
    out = place / "out" / "q"
    assert not any((out / name).exists() for name in ("tokenizer_x", "LICENSE", "additional_chat_templates"))
    assert (out / "NOTICE").read_text() == (model / "config.json").read_text()
    assert not any(b"not for upload" in path.read_bytes() for path in out.rglob("*") if path.is_file())
    for name in ("tokenizer_x", "LICENSE", "additional_chat_templates/tool.jinja"):
        assert (
            f"{name} is a link that leads out of the model's directory, to {place / 'secret'}" in ran.stderr
        )


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
)
def test_what_makes_the_model_may_not_lead_out(name: str, place: Path, model: Path) -> None:
    (model / name).rename(place / name)
    (model / name).symlink_to(place / name)
    refused(place, run(place, model), 3, f"{name} is a link that leads out of the model's directory", "cp ")
    assert gptq("inspect-map", model, "--device-map", "cpu").code == 3


def test_a_hub_cache_and_a_linked_directory_are_fine(place: Path, model: Path) -> None:
    repository = place / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for index, path in enumerate(sorted(model.iterdir())):
        path.rename(repository / "blobs" / f"b{index}")
        (snapshot / path.name).symlink_to(f"../../blobs/b{index}")
    (place / "alias").symlink_to(snapshot)
    assert run(place, place / "alias").code == 0
    assert (place / "out" / "q" / "tokenizer.json").is_file()
    assert not (place / "out" / "q" / "tokenizer.json").is_symlink()


def test_load_opens_a_checkpoint_of_links(place: Path, checkpoint: Path) -> None:
    """Nothing is copied there: a directory of links to one's own files is one's own affair."""
    linked = place / "linked"
    linked.mkdir()
    for path in checkpoint.iterdir():
        (linked / path.name).symlink_to(path)
    assert gptq("load", linked, "--prompt", "x", "--max-new-tokens", "1", "--progress", "none").code == 0


# -- what is no file


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("config.json", 2),
        ("model.safetensors", 3),
        ("tokenizer.json", 3),
        ("tokenizer_config.json", 3),
        ("generation_config.json", 3),
        ("special_tokens_map.json", 3),
        ("chat_template.jinja", 3),
        (INDEX, 3),
    ],
)
def test_a_pipe_is_never_opened(name: str, code: int, place: Path, model: Path) -> None:
    (model / name).unlink(missing_ok=True)
    if name == INDEX:
        (model / "model.safetensors").unlink()
    os.mkfifo(model / name)
    refused(place, run(place, model), code, name, "a named pipe")
    ran = gptq("load", model, "--progress", "none")
    assert ran.code == 2


@pytest.mark.parametrize(
    "name", ["config.json", "quantize_config.json", "model.safetensors", "tokenizer.json"]
)
def test_load_never_opens_a_pipe(name: str, checkpoint: Path) -> None:
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    for words in (("--prompt", "x"), ("--verify",)):
        ran = gptq("load", checkpoint, *words, "--progress", "none")
        assert ran.code in (2, 5)
        assert name in ran.stdout + ran.stderr


# -- more than there is


def config_with(model: Path, **fields: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | fields))


HUGE: list[dict[str, Any]] = [
    {"num_labels": 1_000_000_000},
    {"num_labels": 1e9},
    {"num_hidden_layers": 1_000_000_000},
    {"num_hidden_layers": 10**30},
    {"text_config": {"num_labels": 1_000_000_000}},
    {"vision_config": {"depth": 1_000_000_000}},
    {"quantized": [{"deep": {"n_layer": 1_000_000_000}}]},
    {"num_experts": 1_000_000_000},
    {"layer_types": ["full_attention"] * 1_000_000},
    {"id2label": {str(index): "x" for index in range(200_000)}},
    {"vocab_size": 1_000_000_000_000},
    {"vocab_size": 10**30},
    {"hidden_size": 10**12},
    {"num_attention_heads": 10**9},
    {"max_position_embeddings": 10**30, "vocab_size": 10**12},
]


@pytest.mark.parametrize("fields", HUGE, ids=[str(fields)[:40] for fields in HUGE])
def test_a_config_that_asks_for_too_much(fields: dict[str, Any], place: Path, model: Path) -> None:
    config_with(model, **fields)
    ran = run(place, model)
    assert ran.code in (2, 3), ran.stderr
    refused(place, ran, ran.code, "config.json" if ran.code == 2 and "vocab" not in str(fields) else "")


def test_more_modules_than_the_files_could_fill(
    place: Path, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptq_cli.model.meta._MODULES_LIMIT", 11)
    model = Path(shutil.copytree(tiny("llama"), place / "model"))
    tensors = load_file(model / "model.safetensors")
    few = {name: value for name, value in tensors.items() if "layers" not in name}
    save_file(few, model / "model.safetensors", {"format": "pt"})
    config_with(model, num_hidden_layers=3)
    refused(place, run(place, model), 2, "more than 20 modules", "3 tensors")


def head(model: Path, text: str, data: bytes = b"") -> None:
    encoded = text.encode()
    (model / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


ENTRY = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
HEADS = {
    "20,000 doubled names": "{" + ",".join(f'"{i % 20_000}":{ENTRY}' for i in range(40_000)) + "}",
    "a shape of huge integers": '{"a":{"dtype":"F32","shape":['
    + ",".join(["9" * 4000] * 3000)
    + '],"data_offsets":[0,0]}}',
    "a long shape": '{"a":{"dtype":"F32","shape":['
    + ",".join(["9999"] * 500_000)
    + '],"data_offsets":[0,0]}}',
    "numbers of 100,000 digits": '{"a":{"dtype":"F32","shape":[' + "9" * 100_000 + '],"data_offsets":[0,0]}}',
    "a name of a million characters": '{"' + "a" * 1_000_000 + '":' + ENTRY + "}",
    "a dtype of a million characters": '{"a":{"dtype":"'
    + "F" * 1_000_000
    + '","shape":[],"data_offsets":[0,4]}}',
    "deep": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "three million empty lists": '{"a":[' + ",".join(["[]"] * 3_000_000) + "]}",
}


@pytest.mark.parametrize("text", HEADS.values(), ids=HEADS)
def test_a_head_that_asks_for_too_much(text: str, place: Path, model: Path) -> None:
    head(model, text)
    refused(place, run(place, model), 3, "model.safetensors")


@pytest.mark.parametrize(
    "text",
    [
        '{"weight_map": ' * 100_000 + "1" + "}" * 100_000,
        '{"weight_map": {"a": [' + ",".join(["[]"] * 3_000_000) + "]}}",
        '{"weight_map": {"' + "a" * 1_000_000 + '": "model-1.safetensors"}}',
        '{"weight_map": {"a": ' + "9" * 100_000 + "}}",
    ],
    ids=["deep", "wide", "a long name", "a long number"],
)
def test_an_index_that_asks_for_too_much(text: str, place: Path, tiny_llama_sharded: Path) -> None:
    model = Path(shutil.copytree(tiny_llama_sharded, place / "model"))
    (model / INDEX).write_text(text)
    refused(place, run(place, model), 3, INDEX)


def test_a_config_that_is_deep_or_large(place: Path, model: Path) -> None:
    (model / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    refused(place, run(place, model), 2, "config.json")
    (model / "config.json").write_text('{"a": "' + "x" * 20_000_000 + '"}')
    refused(place, run(place, model), 2, "config.json has more than 10000000 bytes")


def test_a_tokenizer_that_would_fill_the_memory(place: Path, model: Path) -> None:
    (model / "tokenizer_config.json").write_text('{"a": [' + ",".join(["{}"] * 4_000_000) + "]}")
    refused(place, run(place, model), 3, "tokenizer_config.json has 12000008 bytes; allowed: 8000000")


@pytest.mark.parametrize(
    "rules",
    [
        {f"model.x.{index}": "cpu" for index in range(120_000)},
        {f"model.layers.{index}": "cpu" for index in range(120_000)} | {"": "cpu"},
        {f"model.layers.{index}-{index + 5}": "cpu" for index in range(9_000)} | {"": "cpu"},
        {f"model.x.{index}": "cpu" for index in range(9_000)},
        {f"model.x.{index}": f"cuda:{index}" for index in range(9_000)},
    ],
    ids=["unknown", "layers", "ranges", "9,000 unknown", "9,000 devices"],
)
def test_a_map_of_many_rules(rules: dict[str, str], place: Path, model: Path) -> None:
    (place / "map.json").write_text(json.dumps(rules))
    ran = run(place, model, "--device-map", f"@{place / 'map.json'}")
    assert ran.code == (2 if len(rules) > 10_000 or "-" in next(iter(rules)) else 3)
    assert list((place / "out").iterdir()) == []
    assert len(ran.stderr) < 100_000


def test_a_template_that_loops(place: Path, model: Path, checkpoint: Path) -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (checkpoint / "chat_template.jinja").write_text(loop)
    ran = gptq("load", checkpoint, "--prompt", "x", "--progress", "none")
    assert ran.code == 2
    assert "the chat template was stopped" in ran.stderr
    shutil.rmtree(checkpoint)
    (model / "chat_template.jinja").write_text(loop)
    rows = [{"messages": [{"role": "user", "content": "hello"}]}] * 50
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ran = run(place, model, "--calibration", place / "rows.jsonl")
    refused(place, ran, 3, "the chat template was stopped")


# -- the environment


def test_a_package_that_cannot_be_imported_is_no_fault_of_the_config(
    place: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        try:
            raise ImportError("cannot import name 'x' from 'torch'")
        except ImportError as error:
            raise RuntimeError(
                "Failed to import transformers.models.llama because of the following"
            ) from error

    for name in ("AutoConfig.from_pretrained", "AutoModelForCausalLM.from_config"):
        with monkeypatch.context() as patch:
            patch.setattr(f"transformers.{name}", broken)
            ran = run(place, model)
        refused(place, ran, 1, "cannot import name 'x' from 'torch'")
        assert "config.json" not in ran.stderr


LEFT_FROM_TRAINING = {
    "return_dict": False,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_router_logits": True,
}


def test_what_a_config_asks_of_a_forward_does_not_matter(tiny: TinyFactory, place: Path) -> None:
    """A forward that gives a tuple, or the routers' losses, is as good as another one."""
    source = tiny("qwen3_moe")
    model = place / "model"
    shutil.copytree(source, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | LEFT_FROM_TRAINING))
    runs = []
    for directory in (source, model):
        out = place / "out" / directory.name
        text = ("--calibration", place / "text.txt", *FAST, "--fisher-tokens", "96")
        ran = gptq("quantize", directory, "--out", out, *text)
        assert ran.code == 0, ran.stderr
        proof = ("--prompt", "one", "--max-new-tokens", "2", "--eval", place / "text.txt", "--verify")
        ran = gptq("load", out, *proof, "--against", directory, "--json")
        assert ran.code == 0, ran.stderr
        runs.append((load_file(out / "model.safetensors"), ran.document["agreement"]))
    (plain, agreement), (asked, same) = runs
    assert plain.keys() == asked.keys()
    assert all(torch.equal(plain[name], asked[name]) for name in plain)
    assert agreement == same
    written = json.loads((place / "out" / "model" / "config.json").read_text())
    assert {name: written[name] for name in LEFT_FROM_TRAINING} == LEFT_FROM_TRAINING
