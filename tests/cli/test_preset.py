"""`--config FILE.toml`: what a preset may say, and who wins."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

import gptq_cli
from gptq_cli.cli.preset import shipped_presets
from gptq_cli.config import QuantizeConfig
from gptq_cli.module_settings import parse_module_rules
from gptq_cli.placement.device_map import DeviceMap, MaxMemory
from tests.cli.conftest import FakeJobs, Run

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.toml"))


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    """A path for a preset."""
    return tmp_path / "preset.toml"


def test_flags_win_over_the_environment_over_a_preset_over_the_default(
    jobs: FakeJobs, run: Run, preset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset.write_text("bits = 8\ngroup_size = 32\nsamples = 11\n")
    monkeypatch.setenv("GPTQ_GROUP_SIZE", "64")
    monkeypatch.setenv("GPTQ_SAMPLES", "12")
    assert run("quantize", "M", "--out", "O", "--config", str(preset), "--samples", "13").code == 0
    found = (
        jobs.job.quantize.bits,
        jobs.job.quantize.group_size,
        jobs.job.calibration.samples,
        jobs.job.calibration.seed,
    )
    assert found == (8, 64, 13, 0)


def test_a_preset_may_hold_everything_even_model_and_destination(
    jobs: FakeJobs, run: Run, preset: Path
) -> None:
    preset.write_text(
        'model = "M"\nout = "O"\nsym = false\ndesc-act = true\ndamp_percent = 0.1\ndtype = "float16"\n'
        'calibration = "a.txt"\nmax-shard-size = "1GB"\nstrict = true\nprogress = "none"\n'
        'device_map = { "model.embed_tokens" = 0, rest = "cpu" }\n'
        'max_memory = { 0 = "20GiB", cpu = "48GiB" }\n'
    )
    outcome = run("quantize", "--config", str(preset))
    assert (outcome.code, outcome.err) == (0, "")
    job = jobs.job
    assert (job.model.model, job.out, job.model.dtype, job.strict) == ("M", "O", "float16", True)
    assert job.quantize == QuantizeConfig(sym=False, desc_act=True, damp_percent=0.1)
    assert (job.calibration.words, job.max_shard_bytes) == ("a.txt", 10**9)
    assert job.device_map == DeviceMap.parse("model.embed_tokens=0,rest=cpu")
    assert job.max_memory == MaxMemory.parse("0=20GiB,cpu=48GiB")


def test_a_switch_of_a_preset_can_be_taken_back(jobs: FakeJobs, run: Run, preset: Path) -> None:
    preset.write_text("sym = false\n")
    assert run("quantize", "M", "--out", "O", "--config", str(preset), "--sym").code == 0
    assert jobs.job.quantize.sym is True


def test_one_preset_serves_all_commands(jobs: FakeJobs, run: Run, preset: Path) -> None:
    preset.write_text('bits = 8\ndevice_map = "cpu"\nout = "O"\neval = "pydoc"\nwindows = 3\n')
    assert run("inspect-map", "M", "--config", str(preset)).code == 0
    assert (jobs.job.quantize.bits, str(jobs.job.device_map)) == (8, "cpu")
    assert run("load", "DIR", "--config", str(preset)).code == 0
    assert (jobs.job.evaluate, jobs.job.windows, str(jobs.job.device_map)) == ("pydoc", 3, "cpu")


@pytest.mark.parametrize("text", ['target = ["vllm", "sglang"]', 'target = "vllm"'])
def test_an_option_that_repeats_is_a_list(jobs: FakeJobs, run: Run, preset: Path, text: str) -> None:
    preset.write_text(text)
    assert run("load", "DIR", "--config", str(preset)).code == 0
    assert jobs.job.targets == (("vllm", "sglang") if "[" in text else ("vllm",))
    assert run("load", "DIR", "--config", str(preset), "--target", "gptqmodel").code == 0
    assert jobs.job.targets == ("gptqmodel",)


def test_sources_with_weights_are_a_list(
    jobs: FakeJobs, run: Run, preset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset.write_text('calibration = ["a.txt*0.5", "pydoc*0.5"]')
    assert run("quantize", "M", "--out", "O", "--config", str(preset)).code == 0
    assert jobs.job.calibration.words == "a.txt*0.5, pydoc*0.5"
    monkeypatch.setenv("GPTQ_CALIBRATION", "my notes.txt*2\n\npydoc\n")  # one a line: paths hold spaces
    assert run("quantize", "M", "--out", "O", "--config", str(preset)).code == 0
    assert jobs.job.calibration.words == "my notes.txt*2, pydoc"
    words = ("--calibration", "c.txt", "--calibration", "d.txt")
    assert run("quantize", "M", "--out", "O", "--config", str(preset), *words).code == 0
    assert jobs.job.calibration.words == "c.txt, d.txt"


def test_a_bad_weight_is_an_error_of_usage(jobs: FakeJobs, run: Run) -> None:
    outcome = run("quantize", "M", "--out", "O", "--calibration", "pydoc*half")
    assert (outcome.code, jobs.called) == (2, "")
    assert "the weight of 'pydoc' is 'half'; allowed: a number above 0" in outcome.err


def test_the_items_of_a_list_are_judged(jobs: FakeJobs, run: Run, preset: Path) -> None:
    preset.write_text("target = [3]")
    outcome = run("load", "DIR", "--config", str(preset))
    assert outcome.code == 2
    assert "target is 3; allowed: a text in quotes" in outcome.err


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("group_sise = 64", "has the unknown key 'group_sise'", "did you mean group_size?"),
        ("evaluate = 'x'", "has the unknown key 'evaluate'", "did you mean eval?"),
        ("config = 'x'", "has the unknown key 'config'", "allowed keys"),
        ("[quantize]\nbits = 4", "has the unknown key 'quantize'", "not in a section"),
        ("bits = 'four'", 'bits is "four"; allowed: a whole number', ""),
        ("bits = 4.0", "bits is 4.0; allowed: a whole number", ""),
        ("bits = true", "bits is true; allowed: a whole number", ""),
        ("sym = 1", "sym is 1; allowed: true or false", ""),
        ("damp_percent = '5 %'", 'damp_percent is "5 %"; allowed: a number', ""),
        ("dtype = 'int8'", "dtype is \"int8\"; allowed: 'auto', 'float16', 'bfloat16', 'float32'", ""),
        ("out = 3", "out is 3; allowed: a text in quotes", ""),
        ("device_map = 0", "device_map is 0; allowed: a text in quotes, a table of names and values", ""),
        ("calibration = { a = 1 }", 'calibration is {"a": 1}; allowed: a text in quotes', ""),
        ("seed = 1979-05-27", 'seed is "1979-05-27"; allowed: a whole number', ""),
        ("bits = ", "is not valid TOML: the last line, 'bits =': this is not a value", "NAME = VALUE"),
        ("bits = four\nseed = 1", "line 1, column 8 of 'bits = four': this is not a value", "in quotes"),
        ("bits = 4\nbits = 3\nseed = 1", "of 'bits = 3': the name was given before", ""),
        ("out = 'a", "a quotation mark is missing", ""),
        ("bits 4", "of 'bits 4': there is no = after the name", ""),
        ("bits = 4 seed = 1", "something follows the value", ""),
        ("group_size = 1\ngroup-size = 2", "has 'group_size' twice", ""),
    ],
)
def test_a_bad_preset_says_where_and_what(
    jobs: FakeJobs, run: Run, preset: Path, text: str, message: str, hint: str
) -> None:
    preset.write_text(text)
    outcome = run("quantize", "M", "--out", "O", "--config", str(preset))
    assert (outcome.code, outcome.out, jobs.called) == (2, "", "")
    assert outcome.err.startswith(f"error: preset '{preset}'")
    assert message in outcome.err
    assert hint in outcome.err


DEEP = [
    "target = " + "[" * 20_000 + "]" * 20_000,
    "target = " + "[" * 50 + "]" * 50,
    "device_map." + "a." * 20_000 + "b = 1",
    "device_map = " + "{a = " * 100 + "1" + "}" * 100,
    "max_memory." + "a." * 500 + "b = 1",
    "[" + "'a' . " * 70 + "b]",
]
ENDLESS_KEYS = [
    "a." * 500_000 + "b = 1",
    "[" + '"a" . ' * 150_000 + "b]",
    "x = {" + "a." * 500_000 + "b = 1}",
]


@pytest.mark.parametrize("text", DEEP, ids=range(len(DEEP)))
def test_a_deep_preset_is_refused(run: Run, preset: Path, text: str) -> None:
    preset.write_text(text)
    outcome = run("quantize", "M", "--out", "O", "--config", str(preset))
    assert (outcome.code, outcome.out) == (2, "")
    assert "is nested too deeply; allowed: 8 levels" in outcome.err


@pytest.mark.parametrize("text", ENDLESS_KEYS, ids=range(len(ENDLESS_KEYS)))
def test_a_key_of_endless_parts_is_refused_unparsed(
    run: Run, preset: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parser takes a minute and more for such a key."""
    monkeypatch.setattr("tomllib.loads", lambda text: pytest.fail("it was parsed"))
    preset.write_text(text)
    outcome = run("inspect-map", "M", "--config", str(preset))
    assert (outcome.code, outcome.out) == (2, "")
    assert "is nested too deeply; allowed: 8 levels" in outcome.err


def test_a_long_map_in_a_preset_is_no_key(jobs: FakeJobs, run: Run, preset: Path) -> None:
    names = [f"model.layers.{number}.self_attn.q_proj" for number in range(200)]
    preset.write_text("device_map = '" + ",".join(f"{name}=0" for name in names) + "'\n")
    assert run("inspect-map", "M", "--config", str(preset)).code == 0


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"# x\n" * 300_000, "has more than 1048576 bytes"),
        (b"bits = " + b"9" * 5000, "is not valid TOML"),
        (b"\x1f\x8b\x08\x00", "is not valid TOML"),
        (b"x" * 100_000 + b" = 1", "has the unknown key"),
        (b'bits = "' + b"x" * 100_000 + b'"', "allowed: a whole number"),
    ],
)
def test_a_preset_that_is_none_is_one_short_error(run: Run, preset: Path, data: bytes, says: str) -> None:
    preset.write_bytes(data)
    outcome = run("quantize", "M", "--out", "O", "--config", str(preset))
    assert (outcome.code, outcome.out) == (2, "")
    assert says in outcome.err
    assert len(outcome.err) < 3000


def test_a_byte_order_mark_is_no_part_of_a_preset(jobs: FakeJobs, run: Run, preset: Path) -> None:
    """As an editor on Windows writes it; a device map in a file may begin with one, too."""
    preset.write_bytes(b"\xef\xbb\xbfbits = 8\r\n")
    assert run("quantize", "M", "--out", "O", "--config", str(preset)).code == 0
    assert jobs.job.quantize.bits == 8
    preset.write_bytes(b"\xef\xbb\xbfbits = \r\n")
    assert "line 1, column 8 of 'bits ='" in run("quantize", "M", "--config", str(preset)).err


@pytest.mark.parametrize("name", ["x" * 5000, "/dev/zero"])
def test_a_preset_that_cannot_be_a_file(run: Run, name: str) -> None:
    outcome = run("quantize", "M", "--out", "O", "--config", name)
    assert (outcome.code, outcome.out) == (2, "")
    assert "cannot be read: " in outcome.err


def test_a_preset_may_come_out_of_a_pipe(jobs: FakeJobs, run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p")
    writer = threading.Thread(target=lambda: (tmp_path / "p").write_text("bits = 8\n"))
    writer.start()
    assert run("quantize", "M", "--out", "O", "--config", str(tmp_path / "p")).code == 0
    writer.join()
    assert jobs.job.quantize.bits == 8


def test_values_are_judged_where_flags_are(jobs: FakeJobs, run: Run, preset: Path) -> None:
    preset.write_text("bits = 5\n")
    assert "bits is 5; allowed: 2, 3, 4, 8" in run("quantize", "M", "--out", "O", "--config", str(preset)).err


def test_a_preset_that_is_not_there(jobs: FakeJobs, run: Run, tmp_path: Path) -> None:
    outcome = run("quantize", "M", "--config", str(tmp_path / "none.toml"))
    assert outcome.code == 2
    assert "cannot be read: no such file or directory" in outcome.err
    outcome = run("quantize", "M", "--config", str(tmp_path))
    assert (outcome.code, "is a directory" in outcome.err) == (2, True)
    (tmp_path / "latin.toml").write_bytes(b"out = '\xe9'")
    assert "is not valid TOML" in run("quantize", "M", "--config", str(tmp_path / "latin.toml")).err


def test_the_preset_may_come_from_the_environment(
    jobs: FakeJobs, run: Run, preset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset.write_text("bits = 8\njson = true\n")
    monkeypatch.setenv("GPTQ_CONFIG", str(preset))
    outcome = run("quantize", "M", "--out", "O")
    assert outcome.out.startswith("{")
    assert jobs.job.quantize.bits == 8


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_loads(jobs: FakeJobs, run: Run, path: Path) -> None:
    outcome = run("quantize", "M", "--out", "O", "--config", str(path))
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("name", shipped_presets())
def test_a_shipped_preset_is_found_by_name(
    jobs: FakeJobs, run: Run, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()  # where a checkpoint may well be called so
    monkeypatch.chdir(tmp_path)
    outcome = run("quantize", "M", "--out", "O", "--config", name, "--seed", "3")
    assert outcome.code == 0, outcome.err
    config = jobs.job.quantize
    assert name == f"w{config.bits}" or name == f"w{config.bits}g{config.group_size}"
    assert jobs.job.calibration.seed == 3


def test_presets_are_shipped_with_the_package() -> None:
    assert set(shipped_presets()) >= {"w4g128", "w4g32", "w8"}
    package = Path(gptq_cli.__file__).parent
    assert all(path.is_relative_to(package) for path in shipped_presets().values())


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("w4g12", "did you mean --config w4g128?"),
        ("w8g", "did you mean --config w8?"),
        ("fastest", ""),
    ],
)
def test_an_unknown_name_lists_what_is_available(jobs: FakeJobs, run: Run, name: str, hint: str) -> None:
    outcome = run("quantize", "M", "--out", "O", "--config", name)
    assert (outcome.code, outcome.out, jobs.called) == (2, "", "")
    available = ", ".join(shipped_presets())
    expected = f"error: preset '{name}' is not found; available: {available}, or the path of a file\n"
    assert outcome.err == expected + (f"  hint: {hint}\n" if hint else "")


def test_a_path_still_works_even_without_a_suffix(
    jobs: FakeJobs, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").write_text("bits = 8\n")
    (tmp_path / "w4g128").write_text("bits = 3\n")
    monkeypatch.chdir(tmp_path)
    for value, bits in (("mine", 8), ("./w4g128", 3), ("w4g128", 4)):
        assert run("quantize", "M", "--out", "O", "--config", value).code == 0
        assert jobs.job.quantize.bits == bits


def test_the_old_path_of_a_shipped_preset_says_its_name(jobs: FakeJobs, run: Run) -> None:
    outcome = run("quantize", "M", "--out", "O", "--config", "nowhere/w8.toml")
    assert outcome.code == 2
    assert "hint: did you mean --config w8, which comes with gptq?" in outcome.err


@pytest.mark.parametrize(("written", "found"), [("64", 64), ("-1", -1), ('"auto"', "auto"), ("128", 128)])
def test_a_group_size_is_a_number_or_auto(
    jobs: FakeJobs, run: Run, preset: Path, written: str, found: object
) -> None:
    preset.write_text(f"group_size = {written}\n")
    outcome = run("quantize", "M", "--out", "O", "--config", str(preset))
    assert (outcome.code, jobs.job.quantize.group_size) == (0, found), outcome.err


@pytest.mark.parametrize("written", ['"64"', '"best"', "true", "64.0"])
def test_a_preset_takes_no_other_group_size(jobs: FakeJobs, run: Run, preset: Path, written: str) -> None:
    preset.write_text(f"group_size = {written}\n")
    outcome = run("quantize", "M", "--out", "O", "--config", str(preset))
    assert outcome.code == 2
    assert "allowed: 'auto', a whole number" in outcome.err


def test_settings_by_module_are_a_table(jobs: FakeJobs, run: Run, preset: Path) -> None:
    preset.write_text(
        'bits = 4\n[modules]\n"model.layers.*.mlp.down_proj" = "bits:8,group:64"\n'
        'model.layers.3 = "dense"\n"model.layers.0" = { bits = 8, sym = false }\n'
    )
    assert run("quantize", "M", "--out", "O", "--config", str(preset)).code == 0
    assert jobs.job.quantize.modules == parse_module_rules(
        ["model.layers.*.mlp.down_proj=bits:8,group:64", "model.layers.3=dense", "model.layers.0=bits:8,asym"]
    )
    assert run("quantize", "M", "--out", "O", "--config", str(preset), "--module", "a=dense").code == 0
    assert jobs.job.quantize.modules == parse_module_rules("a=dense")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[modules]\na = "bits:5"\n', "bits is 5; allowed: 2, 3, 4, 8"),
        ("[modules]\na = 8\n", "a is 8; allowed: dense"),
        ("modules = 3\n", "module"),
    ],
)
def test_a_wrong_table_of_modules(run: Run, preset: Path, text: str, message: str) -> None:
    preset.write_text(text)
    outcome = run("quantize", "M", "--out", "O", "--config", str(preset))
    assert outcome.code == 2
    assert message in outcome.err
    assert str(preset) in outcome.err


def a_report(**settings: object) -> str:
    """What --config needs of the report of a run."""
    body = {"schema_version": 1, "command_line": ["gptq"], "settings": {"model": "M", "out": "O"} | settings}
    return json.dumps(body)


def test_the_report_of_a_run_is_a_preset(jobs: FakeJobs, run: Run, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text(
        a_report(bits=8, module=["a.b=dense"], calibration=["x.txt*2", "pydoc"], max_memory=None)
    )
    assert run("quantize", "--config", str(report), "--out", "P").code == 0
    assert (jobs.job.model.model, jobs.job.out, jobs.job.quantize.bits) == ("M", "P", 8)
    assert jobs.job.quantize.modules == parse_module_rules(["a.b=dense"])
    assert jobs.job.calibration.words == "x.txt*2, pydoc"


def test_a_report_does_not_decide_whether_code_may_run(jobs: FakeJobs, run: Run, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text(a_report(trust_remote_code=True))
    assert run("quantize", "--config", str(report)).code == 0
    assert not jobs.job.model.trust_remote_code
    assert run("quantize", "--config", str(report), "--trust-remote-code").code == 0
    assert jobs.job.model.trust_remote_code


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read at line 1, column 2"),
        ('{"model_type": "llama"}', "is not the report of a gptq quantize run"),
        ('{"schema_version": 1, "command_line": [], "settings": {"bits": 4}}', "of another version of gptq"),
        (a_report(bits="four"), "bits is"),
        (a_report(colour="red"), "unknown key 'colour'"),
        ('{"settings": ' + "[" * 100_000, "is nested too deeply"),
    ],
)
def test_another_json_document_is_named(
    text: str, said: str, jobs: FakeJobs, run: Run, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    report.write_text(text)
    outcome = run("quantize", "--config", str(report))
    assert outcome.code == 2
    assert said in outcome.err


def test_a_report_larger_than_a_preset_may_be_is_read(jobs: FakeJobs, run: Run, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text(a_report()[:-1] + ', "blocks": "' + "x" * (2 << 20) + '"}')
    assert run("quantize", "--config", str(report)).code == 0
