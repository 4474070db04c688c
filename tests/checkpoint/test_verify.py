"""Every kind of wrong tensor gives its finding, and a sound checkpoint gives none that matters."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gptq_cli.checkpoint.open import open_checkpoint
from gptq_cli.checkpoint.target_facts import target_facts
from gptq_cli.checkpoint.verify import _sound, check_targets, verify_checkpoint
from gptq_cli.findings import Finding
from gptq_cli.model.streamed import StreamedReader
from gptq_cli.readers import Target
from gptq_cli.results.load import VerifyReport
from tests.checkpoint.checkpoints import Recipe, quantize_directory, write_config
from tests.conftest import TinyFactory
from tests.inference.test_load import DAMAGE, Q, change_tensor, drop, rewrite


def found(report: VerifyReport, rule: str) -> Finding:
    """The one finding of `rule`."""
    (finding,) = [finding for finding in report.findings if finding.rule == rule]
    return finding


def rules(report: VerifyReport) -> set[str]:
    return {finding.rule for finding in report.findings if finding.level != "note"}


@pytest.fixture
def checkpoint(tiny_llama: Path, tmp_path: Path) -> Path:
    quantize_directory(tiny_llama, tmp_path / "q", Recipe(group_size=32))
    return tmp_path / "q"


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(group_size=32),
        Recipe(bits=3, group_size=32, sym=False, version="gptq_v2"),
        Recipe(bits=8, group_size=-1),
        Recipe(group_size=16, desc_act=True),
        Recipe(bits=2, group_size=32, version="gptq_v2"),
    ],
)
def test_sound_checkpoints(recipe: Recipe, tiny_llama: Path, tmp_path: Path) -> None:
    quantize_directory(tiny_llama, tmp_path / "q", recipe)
    seen: list[tuple[int, int]] = []
    report = verify_checkpoint(tmp_path / "q", on_tensor=lambda done, total: seen.append((done, total)))
    assert report.ok
    assert rules(report) == set()
    assert report.coverage == 1.0
    assert report.linears == 21
    assert seen[-1] == (report.tensors, report.tensors)


def test_like_findings_are_one(checkpoint: Path) -> None:
    negative = found(verify_checkpoint(checkpoint), "scales-negative")
    assert negative.level == "note"
    assert len(negative.modules) == 21
    assert negative.subject.endswith("and 20 more")


@pytest.mark.parametrize(
    "kind", sorted(set(DAMAGE) - {"g_idx out of range", "g_idx negative", "scales with NaN"})
)
def test_structural_damage_is_listed(kind: str, checkpoint: Path) -> None:
    DAMAGE[kind][0](checkpoint)
    report = verify_checkpoint(checkpoint)
    assert not report.ok
    assert found_any(report, "unreadable")


def found_any(report: VerifyReport, rule: str) -> list[Finding]:
    return [finding for finding in report.findings if finding.rule == rule]


def test_all_structural_problems_at_once(checkpoint: Path) -> None:
    drop(f"{Q}.scales")(checkpoint)
    drop("model.norm.weight")(checkpoint)
    messages = [finding.message for finding in found_any(verify_checkpoint(checkpoint), "unreadable")]
    assert any("q_proj.scales is missing" in message for message in messages)
    assert any("model.norm.weight is missing" in message for message in messages)


def ordered(tensor: Tensor) -> Tensor:
    return tensor[torch.randperm(len(tensor), generator=torch.Generator().manual_seed(0))]


def uneven(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[-1] = 0
    return tensor


def one_nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[3] = float("nan")
    return tensor


def one_zero(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[1, 2] = 0
    return tensor


@pytest.mark.parametrize(
    ("tensor", "change", "rule", "level"),
    [
        (f"{Q}.scales", one_nan, "scales-finite", "error"),
        (f"{Q}.scales", one_zero, "scales-zero", "warning"),
        (f"{Q}.scales", lambda t: t.bfloat16(), "scales-dtype", "warning"),
        (f"{Q}.g_idx", lambda t: t + 1, "g-idx-range", "error"),
        (f"{Q}.g_idx", ordered, "g-idx-order", "warning"),
        (f"{Q}.g_idx", uneven, "g-idx-uneven", "warning"),
        (f"{Q}.g_idx", torch.zeros_like, "g-idx-zero", "note"),
        (f"{Q}.qzeros", lambda t: torch.full_like(t, -0x77777778), "zeros-convention", "error"),
        (f"{Q}.qzeros", lambda t: t + 1, "zeros-differ", "error"),
        (f"{Q}.qweight", torch.zeros_like, "codes-constant", "warning"),
        ("model.norm.weight", one_nan, "dense-finite", "error"),
    ],
)
def test_values(tensor: str, change: object, rule: str, level: str, checkpoint: Path) -> None:
    change_tensor(tensor, change)(checkpoint)  # type: ignore[arg-type]
    report = verify_checkpoint(checkpoint)
    finding = found(report, rule)
    assert finding.level == level
    assert finding.modules == ((tensor if rule == "dense-finite" else Q),)
    assert report.ok is (level != "error")


def test_wrapped_zeros_of_asymmetric_v1(tiny_llama: Path, tmp_path: Path) -> None:
    quantize_directory(tiny_llama, tmp_path / "q", Recipe(group_size=32, sym=False, version="gptq"))
    assert not found_any(verify_checkpoint(tmp_path / "q"), "zeros-wrapped")
    change_tensor(f"{Q}.qzeros", lambda t: torch.full_like(t, -1))(tmp_path / "q")
    assert found(verify_checkpoint(tmp_path / "q"), "zeros-wrapped").level == "warning"


@pytest.mark.parametrize("quantizer", ["gptqmodel:7.6.0", "autogptq:0.8.0"])
def test_zeros_of_0_subtracted_from_whole_words(quantizer: str, tiny_llama: Path, tmp_path: Path) -> None:
    extra = {"meta": {"quantizer": [quantizer]}}
    quantize_directory(tiny_llama, tmp_path / "q", Recipe(group_size=32, sym=False, extra=extra))
    assert not found_any(verify_checkpoint(tmp_path / "q"), "zeros-wrapped")
    change_tensor(f"{Q}.qzeros", lambda t: torch.full_like(t, -0x11111111))(tmp_path / "q")
    wrapped = found(verify_checkpoint(tmp_path / "q"), "zeros-wrapped")
    assert "subtracted from whole words" in wrapped.message
    assert wrapped.modules == (Q,)


def test_biases_that_the_class_has_not_are_no_leftovers(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.update({f"{Q}.bias": torch.zeros(64).half()}))
    assert not found_any(verify_checkpoint(checkpoint), "leftover")


@pytest.mark.parametrize("equal", [True, False])
def test_copies_of_a_tied_tensor(equal: bool, tiny: TinyFactory, tmp_path: Path) -> None:
    quantize_directory(tiny("llama_tied"), tmp_path / "q", Recipe(group_size=32))
    factor = 1 if equal else 2

    def copied(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = factor * tensors["model.embed_tokens.weight"]

    rewrite(tmp_path / "q", copied)
    report = verify_checkpoint(tmp_path / "q")
    assert report.ok
    tied = found_any(report, "dense-tied")
    assert [finding.modules for finding in tied] == ([] if equal else [("lm_head.weight",)])


def test_leftover_tensors(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.update({"model.layers.0.wf_unsqueeze_zero": torch.zeros(3)}))
    assert found(verify_checkpoint(checkpoint), "leftover").modules == ("model.layers.0.wf_unsqueeze_zero",)


def test_an_index_that_leaves_a_tensor_out(tiny_llama: Path, tmp_path: Path) -> None:
    quantize_directory(tiny_llama, tmp_path / "q", Recipe(group_size=32))
    (tmp_path / "q/model.safetensors").rename(tmp_path / "q/model-00001-of-00001.safetensors")
    names = load_file(tmp_path / "q/model-00001-of-00001.safetensors")
    index = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    path = tmp_path / "q/model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    assert rules(verify_checkpoint(tmp_path / "q")) == set()
    del index[f"{Q}.scales"]
    path.write_text(json.dumps({"weight_map": index}))
    finding = found(verify_checkpoint(tmp_path / "q"), "unlisted-tensor")
    assert finding.level == "warning"
    assert f"holds 1 tensor that the index leaves out ({Q}.scales)" in finding.message


def test_configs_that_disagree(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "quantize_config.json").read_text())
    (checkpoint / "quantize_config.json").write_text(json.dumps(config | {"sym": False}))
    assert (
        "sym is false in quantize_config.json but true in config.json"
        in found(verify_checkpoint(checkpoint), "unreadable").message
    )


def test_dense_linears_inside_blocks(tiny_llama: Path, tmp_path: Path) -> None:
    """Dense where the config says nothing: a warning, less coverage; declared: a note."""
    quantize_directory(tiny_llama, tmp_path / "q", Recipe(group_size=32, skip=("lm_head", "down_proj")))
    report = verify_checkpoint(tmp_path / "q")
    assert found(report, "coverage").level == "warning"
    assert len(found(report, "coverage").modules) == 3
    packed = 2 * 64 * 64 + 2 * 32 * 64 + 2 * 128 * 64
    assert report.coverage == pytest.approx(packed / (packed + 128 * 64))
    write_config(tmp_path / "q", Recipe(group_size=32, extra={"dynamic": {r"-:.*down_proj": {}}}))
    assert found(verify_checkpoint(tmp_path / "q"), "coverage").level == "note"
    inside = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    listed = [[*inside, "mlp.gate_proj", "mlp.up_proj"]]
    write_config(tmp_path / "q", Recipe(group_size=32, extra={"modules_in_block_to_quantize": listed}))
    assert found(verify_checkpoint(tmp_path / "q"), "coverage").level == "note"


def test_a_missing_tokenizer_and_config_copy(checkpoint: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "quantize_config.json"):
        (checkpoint / name).unlink()
    report = verify_checkpoint(checkpoint)
    assert report.ok
    assert found(report, "no-tokenizer").level == "warning"
    assert found(report, "config-copy").level == "note"


def test_no_such_directory(tmp_path: Path) -> None:
    report = verify_checkpoint(tmp_path / "nothing")
    assert not report.ok
    assert "no such directory" in found(report, "unreadable").message


def outcomes_of(report: VerifyReport, rule: str) -> dict[str, str]:
    """Target -> what its rule of that name came to."""
    return {
        target.target: result.outcome
        for target in report.targets
        for result in target.rules
        if result.rule == rule
    }


def test_targets_are_checked_rule_by_rule(checkpoint: Path) -> None:
    readers: tuple[Target, ...] = ("vllm", "gptqmodel", "sglang")
    report = verify_checkpoint(checkpoint, targets=readers)
    assert report.ok
    assert outcomes_of(report, "half-precision") == {"vllm": "warning", "sglang": "warning"}
    assert outcomes_of(report, "whole-words") == {"vllm": "ok", "gptqmodel": "ok", "sglang": "ok"}
    change_tensor(f"{Q}.g_idx", ordered)(checkpoint)
    report = verify_checkpoint(checkpoint, targets=readers)
    assert report.sound
    assert [target.target for target in report.targets if not target.ok] == ["vllm"]
    assert report.failures == ("vllm will not take it",)
    assert outcomes_of(report, "activation-order")["vllm"] == "error"


def test_targets_alone_read_g_idx_and_nothing_else(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_tensor(f"{Q}.g_idx", ordered)(checkpoint)
    read: list[str] = []
    real = StreamedReader.get

    def spy(self: StreamedReader, name: str, device: str = "cpu") -> Tensor:
        read.append(name)
        return real(self, name, device)

    monkeypatch.setattr(StreamedReader, "get", spy)
    report = check_targets(checkpoint, ("vllm", "exllamav2"))
    assert {name.rpartition(".")[2] for name in read} == {"g_idx"}
    assert [target.ok for target in report.targets] == [False, True]
    assert report.targets == verify_checkpoint(checkpoint, targets=("vllm", "exllamav2")).targets
    assert not report.ok


def test_targets_of_a_checkpoint_that_cannot_be_read(tmp_path: Path) -> None:
    report = check_targets(tmp_path / "nothing", ("vllm",))
    assert (report.ok, report.targets) == (False, ())
    assert "no such directory" in report.failures[0]


def test_groups_of_another_size_with_as_many_groups(checkpoint: Path) -> None:
    """64 columns have two groups of 32 or of 33: no shape tells them apart."""
    for name in ("config.json", "quantize_config.json"):
        text = (checkpoint / name).read_text(encoding="utf-8")
        (checkpoint / name).write_text(text.replace('"group_size": 32', '"group_size": 33'))
    report = verify_checkpoint(checkpoint)
    finding = found(report, "g-idx-order")
    assert finding.message.endswith("g_idx has groups of 32 columns, but group_size is 33")
    assert "compare group_size" in finding.hint
    assert "g-idx-uneven" not in rules(report)


def test_a_failure_names_its_tensor(checkpoint: Path) -> None:
    """Where the table goes to a file, stderr is all that a log holds."""
    change_tensor(f"{Q}.scales", one_nan)(checkpoint)
    assert verify_checkpoint(checkpoint).failures == (
        f"the files are not sound: {Q}: scales hold values that are not finite",
    )


def test_configs_that_disagree_are_not_referred_to_verify_by_verify(checkpoint: Path) -> None:
    path = checkpoint / "quantize_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"group_size": 64}))
    finding = found(verify_checkpoint(checkpoint), "unreadable")
    assert "group_size is " in finding.message
    assert "set both to what is right" in finding.hint
    assert "--verify" not in finding.hint


def test_every_finding_belongs_to_a_part(checkpoint: Path) -> None:
    """What `verify.py` says stands below the part of the checkpoint that it is about."""
    change_tensor(f"{Q}.scales", one_nan)(checkpoint)
    change_tensor(f"{Q}.g_idx", uneven)(checkpoint)
    change_tensor("model.norm.weight", one_nan)(checkpoint)
    outcomes = {check.rule: check.outcome for check in verify_checkpoint(checkpoint).checks}
    assert outcomes == {
        "files": "ok",
        "names": "ok",
        "coverage": "ok",
        "codes": "ok",
        "zeros": "ok",
        "scales": "error",
        "g-idx": "warning",
        "dense": "error",
    }


def test_facts_of_a_checkpoint(tiny: TinyFactory, tmp_path: Path) -> None:
    recipe = Recipe(
        bits=8, group_size=32, sym=False, version="gptq_v2", skip=(), extra={"dynamic": {"-:nothing": {}}}
    )
    quantize_directory(tiny("llama"), tmp_path / "q", recipe)
    facts = target_facts(open_checkpoint(tmp_path / "q"))
    assert (facts.bits, facts.group_size, facts.sym, facts.desc_act) == (8, 32, False, False)
    assert (facts.checkpoint_format, facts.dtype, facts.scale_dtype) == ("gptq_v2", "float32", "float16")
    assert facts.lm_head
    assert facts.dense == ()
    assert {x.split for x in facts.linears if x.name.endswith(("o_proj", "down_proj"))} == {"row"}
    assert (facts.heads.queries, facts.heads.keys) == (4, 2)
    assert not facts.changed
    assert facts.in_config_json
    assert len(facts.linears) == 22
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    first = facts.linears[0]
    assert tensors[f"{first.name}.scales"].shape[1] == first.out_features


def test_experts_are_verified_too(tiny: TinyFactory, tmp_path: Path) -> None:
    quantize_directory(tiny("mixtral"), tmp_path / "q", Recipe(group_size=32))
    report = verify_checkpoint(tmp_path / "q")
    assert report.ok
    assert report.linears == 2 * (4 + 4 * 3)
    name = next(
        n for n in load_file(tmp_path / "q" / "model.safetensors") if "experts.3" in n and "scales" in n
    )
    change_tensor(name, one_nan)(tmp_path / "q")
    assert found(verify_checkpoint(tmp_path / "q"), "scales-finite").modules == (
        name.removesuffix(".scales"),
    )


def test_a_quantized_head_is_declared_and_of_its_own(tiny: TinyFactory, tmp_path: Path) -> None:
    quantize_directory(tiny("llama"), tmp_path / "head", Recipe(group_size=32, skip=()))
    quantize_directory(tiny("llama"), tmp_path / "plain", Recipe(group_size=32))
    assert "head-agrees" not in rules(verify_checkpoint(tmp_path / "head"))
    for folder, changes, words in (
        ("head", {"lm_head": False}, "it is quantized, but the config says lm_head false"),
        ("plain", {"lm_head": True}, "the config says lm_head true, but the files hold it dense"),
        ("head", {"lm_head": True, "tie_word_embeddings": True}, "readers that tie drop its codes"),
    ):
        path = tmp_path / folder
        config = json.loads((path / "config.json").read_text())
        own = json.loads((path / "quantize_config.json").read_text())
        own["lm_head"] = changes["lm_head"]
        if "quantization_config" in config:
            config["quantization_config"]["lm_head"] = changes["lm_head"]
        config["tie_word_embeddings"] = changes.get("tie_word_embeddings", False)
        (path / "config.json").write_text(json.dumps(config))
        (path / "quantize_config.json").write_text(json.dumps(own))
        finding = found(verify_checkpoint(path), "head-agrees")
        assert (finding.level, finding.subject) == ("warning", "lm_head")
        assert words in finding.message


@pytest.mark.parametrize(
    ("values", "sound"),
    [([float("inf")], True), ([float("-inf")], True), ([float("nan")], False), ([1.0, float("inf")], False)],
)
def test_one_infinite_value_alone_is_a_bound(values: list[float], sound: bool) -> None:
    assert _sound(torch.tensor(values)) == sound


SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.json",
    "preprocessor_config.json",
)


@pytest.mark.parametrize("content", ['{"a": ', "", "[1]"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_beside_the_weights_that_are_no_json_object(
    name: str, content: str, checkpoint: Path
) -> None:
    """Readers stop at such a file, or go without it."""
    (checkpoint / name).write_text(content)
    report = verify_checkpoint(checkpoint)
    finding = found(report, "broken-settings")
    assert (finding.level, finding.subject, finding.hint[:14]) == ("error", name, "fetch the file")
    assert name in finding.message
    assert not report.ok
    assert "files are not sound" in report.failures[0]


@pytest.mark.parametrize("content", ['{"a": ', "", "{}", '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_a_tokenizer_that_no_reader_can_open(content: str, checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text(content)
    report = verify_checkpoint(checkpoint)
    finding = found(report, "tokenizer-broken")
    assert finding.level == "error"
    assert "cannot be opened" in finding.message
    assert not report.ok


@pytest.mark.parametrize(
    "settings", ["{}", '{"tokenizer_class": "GPT2Tokenizer"}', '{"tokenizer_class": "GemmaTokenizer"}']
)
def test_settings_of_a_tokenizer_without_its_vocabulary(settings: str, checkpoint: Path) -> None:
    """Some classes make an empty tokenizer of them, whose only word may be the unknown one."""
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer_config.json").write_text(settings)
    report = verify_checkpoint(checkpoint)
    assert found(report, "tokenizer-broken").level == "error"
    assert not report.ok


def test_a_tokenizer_that_needs_no_vocabulary(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert rules(verify_checkpoint(checkpoint)) == set()


def test_a_tokenizer_whose_code_may_not_run_is_not_said_to_be_broken(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    auto = {"AutoTokenizer": ["tokenization_own.Own", None]}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto}))
    (checkpoint / "tokenization_own.py").write_text("raise RuntimeError\n")
    report = verify_checkpoint(checkpoint)
    assert report.ok
    finding = found(report, "tokenizer-broken")
    assert finding.level == "note"
    assert "is code of the model repository" in finding.message


def test_a_tokenizer_that_takes_a_package_is_not_said_to_be_broken(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of SentencePiece alone, which other machines open."""
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer.model").write_bytes(b"pieces")
    (checkpoint / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    report = verify_checkpoint(checkpoint)
    assert report.ok
    finding = found(report, "tokenizer-broken")
    assert finding.level == "note"
    assert "was not tried" in finding.message


def test_a_chat_template_that_jinja_cannot_read(checkpoint: Path) -> None:
    """Servers start with it, so it is a warning."""
    (checkpoint / "chat_template.jinja").write_text("{{ messages[0].content }}\n{% if %}")
    report = verify_checkpoint(checkpoint)
    assert report.ok
    finding = found(report, "template-broken")
    assert finding.level == "warning"
    assert "(line 2)" in finding.message
