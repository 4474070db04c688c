"""The writer: a complete checkpoint or none, dense tensors byte for byte, the same bytes every time."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gptq_cli import __version__
from gptq_cli.checkpoint import destination
from gptq_cli.checkpoint import writer as writer_module
from gptq_cli.checkpoint.declared import declared_dynamic, modules_in_block
from gptq_cli.checkpoint.destination import Destination
from gptq_cli.checkpoint.layout import plan_checkpoint
from gptq_cli.checkpoint.open import open_checkpoint
from gptq_cli.checkpoint.target_facts import target_facts
from gptq_cli.checkpoint.writer import CheckpointWriter
from gptq_cli.config import QuantizeConfig
from gptq_cli.errors import ConfigError, GptqError, NonFinite
from gptq_cli.model.headers import read_header
from gptq_cli.model.selection import select_linears
from gptq_cli.model.skeleton import Skeleton
from gptq_cli.model.source import INDEX
from tests.checkpoint.unquantized import edit, opened, random_packed, write_checkpoint
from tests.conftest import TinyFactory
from tests.tiny import TINY

CONFIG = QuantizeConfig(group_size=32)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for shard in sorted(path.glob("*.safetensors")):
        found |= load_file(shard)
    return found


def raw(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a directory: dtype, shape, bytes."""
    found = {}
    for shard in sorted(path.glob("*.safetensors")):
        content = shard.read_bytes()
        found |= {t.name: (t.dtype, t.shape, content[t.begin : t.end]) for t in read_header(shard)}
    return found


def fill(writer: CheckpointWriter, skeleton: Skeleton) -> None:
    """Write everything but the last files."""
    for linear in skeleton.linears:
        writer.add_packed(linear, random_packed(linear, CONFIG))
    writer.copy_dense()


def left(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_checkpoint_of_every_architecture(name: str, tiny: TinyFactory, tmp_path: Path) -> None:
    source = tiny(name, dtype=torch.bfloat16)
    skeleton, out = opened(source), tmp_path / "out"
    packed = write_checkpoint(skeleton, out, CONFIG)
    before, after = raw(source), raw(out)
    replaced = {linear.source_key for linear in skeleton.linears}
    parts = {
        f"{x.source_name}.{p}" for x in skeleton.linears for p in ("qweight", "qzeros", "scales", "g_idx")
    }
    assert after.keys() == (before.keys() - replaced) | parts
    for key in before.keys() - replaced:
        assert after[key] == before[key], key
    stored = tensors_of(out)
    for linear in skeleton.linears:
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            assert torch.equal(stored[f"{linear.source_name}.{part}"], getattr(packed[linear.name], part))
    assert left(tmp_path) == ["out"]


def test_config_fields(tiny_llama: Path, tmp_path: Path) -> None:
    write_checkpoint(opened(tiny_llama), tmp_path / "out", CONFIG)
    before = json.loads((tiny_llama / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = after.pop("quantization_config")
    assert after == before
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == quantization
    assert quantization == {
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "format": "gptq",
        "lm_head": False,
        "dynamic": {},
        "pack_dtype": "int32",
        "true_sequential": True,
        "damp_percent": CONFIG.damp_percent,
        "meta": {"quantizer": [f"gptq-cli:{__version__}"]},
    }
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == {"made": "by a test"}


def test_asymmetric_codes_go_out_as_v2(tiny_llama: Path, tmp_path: Path) -> None:
    write_checkpoint(opened(tiny_llama), tmp_path / "out", QuantizeConfig(group_size=32, sym=False))
    quantization = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert quantization["checkpoint_format"] == quantization["format"] == "gptq_v2"


def test_small_files_come_along(tiny_llama: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "source"))
    for name in (
        "chat_template.jinja",
        "merges.txt",
        "LICENSE",
        "tokenizer.model",
        "modeling_x.py",
        "README.md",
    ):
        (source / name).write_text(name)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("x")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    write_checkpoint(opened(source), tmp_path / "out")
    write_checkpoint(opened(source, trust_remote_code=True), tmp_path / "trusted")
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert names == {
        "LICENSE",
        "additional_chat_templates/tools.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "quantize_config.json",
        "report.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert (tmp_path / "trusted" / "modeling_x.py").is_file()


def test_shards_and_index(tiny_llama_sharded: Path, tmp_path: Path) -> None:
    skeleton = opened(tiny_llama_sharded)
    seen: list[tuple[str, int, int]] = []
    write_checkpoint(
        skeleton,
        tmp_path / "out",
        max_shard_bytes=150_000,
        on_shard=lambda path, size, count: seen.append((path.name, size, count)),
    )
    write_checkpoint(skeleton, tmp_path / "single")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert len(shards) > 2
    assert [s.name for s in shards] == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    where = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            where |= dict.fromkeys(file.keys(), shard.name)
    assert index["weight_map"] == where
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(tmp_path / "out").values())
    assert sorted(seen) == sorted(
        (s.name, s.stat().st_size, sum(w == s.name for w in where.values())) for s in shards
    )
    assert raw(tmp_path / "out") == raw(tmp_path / "single")
    for linear in skeleton.linears:
        assert (
            len({where[f"{linear.source_name}.{p}"] for p in ("qweight", "qzeros", "scales", "g_idx")}) == 1
        )


def test_the_plan_knows_the_size(tiny_llama: Path, tmp_path: Path) -> None:
    skeleton = opened(tiny_llama)
    plan = plan_checkpoint(skeleton, CONFIG, 10**9)
    write_checkpoint(skeleton, tmp_path / "out", CONFIG)
    assert plan.size_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_finish_returns_the_bytes_on_disk(tiny_llama: Path, tmp_path: Path) -> None:
    skeleton = opened(tiny_llama)
    with CheckpointWriter(tmp_path / "out", skeleton, CONFIG) as writer:
        fill(writer, skeleton)
        size = writer.finish({})
    assert size == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())


def test_two_runs_write_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    skeleton = opened(tiny_llama)
    write_checkpoint(skeleton, tmp_path / "a")
    packed = {linear.name: random_packed(linear, CONFIG) for linear in skeleton.linears}
    with CheckpointWriter(tmp_path / "b", skeleton, CONFIG) as writer:
        writer.copy_dense()
        for linear in reversed(skeleton.linears):
            writer.add_packed(linear, packed[linear.name])
        writer.finish({"made": "by a test"})
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / x).iterdir()} for x in "ab")
    assert a == b


def test_files_have_ordinary_permissions(tiny_llama: Path, tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        write_checkpoint(opened(tiny_llama), tmp_path / "new" / "parent" / "out")
    finally:
        os.umask(old)
    out = tmp_path / "new" / "parent" / "out"
    assert stat.S_IMODE(out.stat().st_mode) == 0o755
    assert {stat.S_IMODE(p.stat().st_mode) for p in out.iterdir()} == {0o644}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_another_dtype_casts_the_main_one_only(dtype: Any, tiny: TinyFactory, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny("qwen2"), tmp_path / "source"))
    edit(source, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].double()}))
    write_checkpoint(opened(source, dtype=dtype), tmp_path / "out")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    wanted = getattr(torch, dtype)
    assert after["model.norm.weight"].dtype == torch.float64
    for name in ("lm_head.weight", "model.layers.0.self_attn.q_proj.bias", "model.embed_tokens.weight"):
        assert torch.equal(after[name], before[name].to(wanted))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_a_cast_that_overflows(tiny_llama: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "source"))
    edit(source, lambda t: t["lm_head.weight"].__setitem__((0, 0), 1e6))
    with pytest.raises(NonFinite, match=r"lm_head\.weight holds 1e\+06"):
        write_checkpoint(opened(source, dtype="float16"), tmp_path / "out")
    assert left(tmp_path) == ["source"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_interruption_leaves_nothing(error: type[BaseException], tiny_llama: Path, tmp_path: Path) -> None:
    skeleton = opened(tiny_llama)
    with (
        pytest.raises(error),
        CheckpointWriter(tmp_path / "a" / "b" / "out", skeleton, CONFIG) as writer,
    ):
        writer.add_packed(skeleton.linears[0], random_packed(skeleton.linears[0], CONFIG))
        assert not (tmp_path / "a" / "b" / "out").exists()
        assert [path for path in writer.out.parent.iterdir() if path.name.startswith(".")]
        raise error
    assert left(tmp_path) == []


def test_an_unfinished_checkpoint_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    skeleton = opened(tiny_llama)
    with pytest.raises(GptqError, match=r"84 tensors were never written"):  # noqa: SIM117
        with CheckpointWriter(tmp_path / "out", skeleton, CONFIG) as writer:
            writer.copy_dense()
            writer.finish({})
    assert left(tmp_path) == []


def test_a_wrong_tensor_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    skeleton = opened(tiny_llama)
    with CheckpointWriter(tmp_path / "out", skeleton, CONFIG) as writer:
        with pytest.raises(GptqError, match="planned: int32"):
            writer.add_packed(
                skeleton.linears[0], random_packed(skeleton.linears[0], QuantizeConfig(bits=8, group_size=32))
            )
        writer.add_packed(skeleton.linears[1], random_packed(skeleton.linears[1], CONFIG))
        with pytest.raises(GptqError, match="written twice"):
            writer.add_packed(skeleton.linears[1], random_packed(skeleton.linears[1], CONFIG))


def test_an_existing_out(tiny_llama: Path, tmp_path: Path) -> None:
    skeleton, out = opened(tiny_llama), tmp_path / "out"
    write_checkpoint(skeleton, out)
    (out / "mine.txt").write_text("old")
    with pytest.raises(ConfigError, match="exists"):
        write_checkpoint(skeleton, out)
    assert (out / "mine.txt").is_file()
    write_checkpoint(skeleton, out, overwrite=True)
    assert not (out / "mine.txt").exists()
    assert left(tmp_path) == ["out"]


def test_overwrite_touches_no_stranger(tiny_llama: Path, tmp_path: Path) -> None:
    skeleton = opened(tiny_llama)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="is not a checkpoint"):
        write_checkpoint(skeleton, tmp_path / "photos", overwrite=True)
    with pytest.raises(ConfigError, match="is a file"):
        write_checkpoint(skeleton, tmp_path / "file", overwrite=True)
    write_checkpoint(skeleton, tmp_path / "empty", overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").is_file()


@pytest.mark.parametrize("below", [".", ".."])
def test_out_must_not_be_the_model(below: str, tiny_llama: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "models" / "source"))
    with pytest.raises(ConfigError, match="the model itself"):
        write_checkpoint(opened(source), source / below, overwrite=True)
    assert (source / "config.json").is_file()


def test_overwrite_keeps_both_when_the_swap_fails(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton, out = opened(tiny_llama), tmp_path / "out"
    write_checkpoint(skeleton, out)
    old = {p.name: p.read_bytes() for p in out.iterdir()}

    def failing(first: Path, second: Path) -> bool:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(destination, "exchange", failing)
    with pytest.raises(GptqError, match=r"out cannot be put in place: Invalid cross-device link") as caught:
        write_checkpoint(skeleton, out, QuantizeConfig(bits=8, group_size=32), overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == old
    kept = tmp_path / "out.finished"
    assert str(kept) in str(caught.value.hint)
    assert json.loads((kept / "quantize_config.json").read_text())["bits"] == 8
    assert left(tmp_path) == ["out", "out.finished"]


def test_side_files_are_copied_before_the_work(tiny_llama: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "source"))
    (source / "LICENSE").write_text("free")
    skeleton = opened(source)
    with CheckpointWriter(tmp_path / "out", skeleton, CONFIG) as writer:
        (copied,) = set(tmp_path.rglob("LICENSE")) - {source / "LICENSE"}
        assert copied.read_text() == "free"
        fill(writer, skeleton)
        writer.finish({})
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"


def test_what_no_run_wrote_is_left_out(tiny_llama: Path, tmp_path: Path) -> None:
    """As where somebody put a file into the result of a run that had been interrupted."""
    out, skeleton = tmp_path / "out", opened(tiny_llama)
    said: list[str] = []
    with Destination(out, warn=lambda message, hint: said.append(message)) as destination:
        (destination.result / "tokenizer.json").write_text("an earlier run's")
        (destination.result / "report.json").write_text("an earlier run's")
        (destination.result / "stray.txt").write_text("mine")
        (destination.result / "below").mkdir()
        (destination.result / "below" / "stray.txt").write_text("mine")
        with CheckpointWriter(out, skeleton, CONFIG, destination=destination):
            names = {path.name for path in destination.result.rglob("*")}
            assert {"model.safetensors", "tokenizer.json"} <= names
            assert not names & {"stray.txt", "below", "report.json"}
    (one,) = said
    assert one.startswith(f"removed below/stray.txt, stray.txt from {destination.result}: no run wrote")


def test_what_is_not_utf8_in_a_report_stays_readable(tiny_llama: Path, tmp_path: Path) -> None:
    words = os.fsdecode(b"caf\xe9.txt")
    skeleton = opened(tiny_llama)
    with CheckpointWriter(tmp_path / "out", skeleton, CONFIG) as writer:
        fill(writer, skeleton)
        writer.finish({"command_line": [words]})
    text = (tmp_path / "out" / "report.json").read_text(encoding="utf-8")
    assert json.loads(text)["command_line"] == [words]


@pytest.mark.parametrize("overwrite", [False, True])
def test_everything_is_on_the_disk_before_it_is_in_place(
    overwrite: bool, tiny_llama_sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that reaches the disk before its bytes is a broken checkpoint after a power cut."""
    out, skeleton = tmp_path / "out", opened(tiny_llama_sharded)
    if overwrite:
        write_checkpoint(skeleton, out, CONFIG)
    calls: list[tuple[str, tuple[int, int]]] = []

    def identity(at: int | Path) -> tuple[int, int]:
        found = os.stat(at)
        return found.st_dev, found.st_ino

    def noted(name: str, module: Any, number: int = 0) -> None:
        real = getattr(module, name)

        def call(*words: Any, **more: Any) -> Any:
            calls.append((name, identity(words[number])))
            return real(*words, **more)

        monkeypatch.setattr(module, name, call)

    noted("fsync", os)
    noted("rename", os)
    noted("exchange", destination)
    noted("rename_to_free", destination)
    write_checkpoint(skeleton, out, CONFIG, max_shard_bytes=200_000, overwrite=overwrite)
    inside = {identity(path) for path in (out, *out.rglob("*"))}
    placed = max(at for at, (name, of) in enumerate(calls) if name != "fsync" and of == identity(out))
    synced = {of for name, of in calls[:placed] if name == "fsync"}
    assert len(list(out.glob("*.safetensors"))) > 1
    assert inside <= synced
    assert identity(out.parent) in {of for name, of in calls[placed:] if name == "fsync"}


@pytest.mark.parametrize("where", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk(where: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = opened(tiny_llama)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, where, full)
    with pytest.raises(GptqError, match="no space left") as caught:
        write_checkpoint(skeleton, tmp_path / "out")
    assert caught.value.exit_code == 1
    assert str(tmp_path) in caught.value.message
    assert re.search(r"needs \d+ bytes, \d+ are free", caught.value.message)
    assert left(tmp_path) == []


@pytest.mark.parametrize("where", ["ftruncate", "pwrite"])
def test_a_file_that_may_not_be_so_large(
    where: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is not full, and room on it would not help."""

    def too_large(*_: Any) -> int:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(os, where, too_large)
    with pytest.raises(GptqError, match=r"may not be as large as it has to be, \d+ bytes") as caught:
        write_checkpoint(opened(tiny_llama), tmp_path / "out")
    assert "--max-shard-size" in (caught.value.hint or "")
    assert left(tmp_path) == []


def test_a_place_that_cannot_be_written(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(GptqError, match="cannot write to"):
        write_checkpoint(opened(tiny_llama), tmp_path / "file" / "out")


def test_dense_is_copied_in_pieces(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "CHUNK_BYTES", 1000)
    write_checkpoint(opened(tiny_llama, dtype="bfloat16"), tmp_path / "out")
    wanted = tensors_of(tiny_llama)["lm_head.weight"].bfloat16()
    assert torch.equal(tensors_of(tmp_path / "out")["lm_head.weight"], wanted)


def test_dense_modules_inside_blocks_are_declared(tiny: TinyFactory, tmp_path: Path) -> None:
    for name, inside in (("qwen3_moe", "mlp"), ("mixtral", "block_sparse_moe")):
        skeleton = opened(tiny(name))
        patterns = [re.compile(key.removeprefix("-:")) for key in declared_dynamic(skeleton)]
        assert any(p.match(f"model.layers.1.{inside}.gate") for p in patterns)
        for linear in skeleton.linears:
            assert not any(p.match(linear.source_name) for p in patterns)
        assert modules_in_block(skeleton) == ()  # routers are no nn.Linear
    assert declared_dynamic(opened(tiny("llama"))) == {}
    write_checkpoint(opened(tiny("mixtral")), tmp_path / "out")
    dynamic = json.loads((tmp_path / "out" / "quantize_config.json").read_text())["dynamic"]
    # `mlp` is the module's name since Transformers 5
    assert list(dynamic) == [
        r"-:(.*\.)?layers\.\d+\.block_sparse_moe\.gate(\..*)?$",
        r"-:(.*\.)?layers\.\d+\.mlp\.gate(\..*)?$",
    ]


def test_a_mixed_checkpoint_is_read_back(tiny_llama: Path, tmp_path: Path) -> None:
    """Shapes in the plan, `dynamic` and `lm_head` in the config, and what `open_checkpoint` makes of them."""
    config = QuantizeConfig.of(
        group_size=32,
        quantize_head=True,
        modules=["model.layers.*.mlp.down_proj=bits:8,group:64", "model.layers.1.self_attn=dense"],
    ).for_model((), "lm_head")
    skeleton = select_linears(opened(tiny_llama), config)
    write_checkpoint(skeleton, tmp_path / "out", config)
    checkpoint = open_checkpoint(tmp_path / "out")
    formats = {info.name: (info.format.bits, info.format.group_size) for info in checkpoint.linears}
    assert formats == {
        info.name: (config.of_linear(info.name).bits, config.of_linear(info.name).group_columns)
        for info in skeleton.packed
    }
    assert formats["lm_head"] == (8, 32)
    assert len(formats) == 18
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text())["lm_head"] is True
    assert target_facts(checkpoint).lm_head


def test_a_tied_head_is_untied_in_the_checkpoint(tiny: TinyFactory, tmp_path: Path) -> None:
    config = QuantizeConfig(group_size=32, quantize_head=True).for_model((), "lm_head")
    source = tiny("llama_tied")
    write_checkpoint(select_linears(opened(source), config), tmp_path / "out", config)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    tensors = tensors_of(tmp_path / "out")
    assert torch.equal(tensors["model.embed_tokens.weight"], tensors_of(source)["model.embed_tokens.weight"])
    assert "lm_head.weight" not in tensors
    checkpoint = open_checkpoint(tmp_path / "out")
    assert "lm_head" in {info.name for info in checkpoint.linears}


def test_values_are_replaced_where_they_stand(tiny_llama: Path, tmp_path: Path) -> None:
    skeleton = opened(tiny_llama)
    write_checkpoint(skeleton, tmp_path / "before")
    with CheckpointWriter(tmp_path / "after", skeleton, CONFIG) as writer:
        fill(writer, skeleton)
        norm = torch.full((64,), 2.5)
        writer.replace({"model.norm.weight": norm})
        with pytest.raises(GptqError, match=r"tensor other\.weight is not in the plan"):
            writer.replace({"other.weight": norm})
        with pytest.raises(GptqError, match=r"model\.norm\.weight is \[63\]; planned: \[64\]"):
            writer.replace({"model.norm.weight": norm[1:]})
        writer.finish({})
    before, after = tensors_of(tmp_path / "before"), tensors_of(tmp_path / "after")
    assert torch.equal(after["model.norm.weight"], norm)
    assert all(torch.equal(before[name], after[name]) for name in before if name != "model.norm.weight")
