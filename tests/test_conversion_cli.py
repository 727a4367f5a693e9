"""`opt-convert`: what it prints, where, and its exit codes."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conversion import cli, convert, open_checkpoint, plan_conversion, target
from conversion.formats import safetensors_file
from tests.paths import GOLDENS

convert_module = sys.modules["conversion.convert"]  # its name is that of the function in it
MODEL = str(GOLDENS / "pre_ln/torch_bin")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    try:
        code = cli.main(arguments)
    except SystemExit as end:  # argparse ends the process itself
        code = int(end.code or 0)
    return code, *capsys.readouterr()


def test_convert_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, out, err = run(capsys, "convert", MODEL, str(tmp_path / "new"), "--to", "flax", "--dtype", "bfloat16")
    assert (code, err) == (0, "")
    assert out.startswith("torch -> flax: 52 tensors, 113 kB, in ")
    assert out.split()[-3:] == ["flax_model.msgpack", "config.json", "generation_config.json"]
    code, out, err = run(capsys, "convert", MODEL, str(tmp_path / "quiet"), "--to", "tf", "--quiet")
    assert (code, out, err) == (0, "", "")


def test_json_is_all_there_is_on_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    untied = str(GOLDENS / "untied/torch_bin")
    code, out, err = run(capsys, "convert", untied, str(tmp_path / "new"), "--to", "tf", "--json")
    assert code == 0
    assert json.loads(out)["tensors"] == 37
    assert err == f"opt-convert: warning: {json.loads(out)['warnings'][0]}\n"
    code, out, _ = run(capsys, "inspect", MODEL, "--json")
    assert (code, json.loads(out)["parameters"]) == (0, 56672)
    code, out, _ = run(capsys, "verify", MODEL, "--json", "--against", untied)
    assert code == 3
    assert not json.loads(out)["holds"]


def test_inspect_groups_the_layers(capsys: pytest.CaptureFixture[str]):
    code, out, _ = run(capsys, "inspect", MODEL)
    assert code == 0
    assert "3 layers, hidden 32, 4 heads, ffn 128, vocabulary 512, positions 64, pre-norm, head tied" in out
    line = next(line for line in out.splitlines() if "fc1.weight" in line)
    assert line.split() == ["model.decoder.layers.*.fc1.weight", "float32", "[128,", "32]", "×3"]


def test_inspect_tells_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "pytorch_model.bin").symlink_to(GOLDENS / "pre_ln/torch_bin/pytorch_model.bin")
    config = json.loads((GOLDENS / "pre_ln/torch_bin/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    code, out, _ = run(capsys, "inspect", str(tmp_path))
    assert code == 0
    assert "would not load" in out
    assert "unexpected: model.decoder.layers.2.fc1.weight" in out


def test_verify_prints_the_table_and_its_verdict(capsys: pytest.CaptureFixture[str]):
    code, out, _ = run(capsys, "verify", MODEL, "--against", str(GOLDENS / "pre_ln/tf_h5"))
    assert code == 0
    assert "52 the same bits" in out
    assert next(line.split()[-1] for line in out.splitlines() if "greedy continuation" in line) == "equal"
    assert out.endswith("holds\n")
    code, out, _ = run(capsys, "verify", MODEL, "--against", str(GOLDENS / "gelu/tf_h5"))
    assert code == 3
    assert "num_hidden_layers" in out
    assert out.endswith("DOES NOT HOLD\n")
    code, out, _ = run(capsys, "verify", MODEL)
    assert (code, out.splitlines()[-1]) == (0, "holds")


@pytest.mark.parametrize("command", [[], ["convert"], ["inspect"], ["verify"]])
def test_help_has_examples_and_the_exit_codes(command: list[str], capsys: pytest.CaptureFixture[str]):
    code, out, _ = run(capsys, *command, "--help")
    assert code == 0
    assert "exit codes:" in out
    assert not command or f"opt-convert {command[0]} " in out.split("examples:")[1]


@pytest.mark.parametrize(
    "arguments",
    [[], ["convert", "a", "b"], ["convert", "a", "b", "--to", "onnx"], ["verify", "a", "b", "c"], ["destroy"]],
)
def test_a_wrong_command_line_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: opt-convert")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["inspect", "./no/such/place"], "there is no directory './no/such/place'"),
        (["inspect", "{tmp}"], "No config.json in {tmp}"),
        (["convert", MODEL, "{tmp}", "--to", "tf"], "{tmp} exists"),
        (["convert", MODEL, "{tmp}/a", "--to", "tf", "--dtype", "int4"], "dtype is 'int4'"),
        (["convert", MODEL, "{tmp}/a", "--to", "tf", "--max-shard-size", "big"], "max_shard_size is 'big'"),
    ],
)
def test_a_users_mistake_is_1_and_a_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    code, out, err = run(capsys, *(argument.format(tmp=tmp_path) for argument in arguments))
    assert (code, out) == (1, "")
    assert sentence.format(tmp=tmp_path).lower() in err.lower()
    assert err.startswith("opt-convert: ")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "exit_code", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "there"), 1, "there: Permission denied"),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (MemoryError(), 1, "memory is too small"),
    ],
)
def test_what_the_machine_refuses_leaves_nothing(
    error: BaseException,
    exit_code: int,
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    def fail(path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(safetensors_file, "write", fail)
    code, out, err = run(capsys, "convert", MODEL, str(tmp_path / "new"), "--to", "safetensors")
    assert (code, out) == (exit_code, "")
    assert sentence in err
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_and_the_program_runs_by_itself(tmp_path: Path):
    """CTranslate2's converter takes --force for leave to remove the whole directory; ours replaces what it writes."""
    command = [sys.executable, "-m", "conversion.cli", "convert", MODEL, str(tmp_path / "new"), "--to", "safetensors"]
    for options, code in (([], 0), ([], 1), (["--force"], 0)):
        result = subprocess.run([*command, *options], capture_output=True, text=True, check=False, env=os.environ)
        assert result.returncode == code, result.stderr
        (tmp_path / "new" / "notes.txt").write_text("the only copy")
    assert (tmp_path / "new" / "notes.txt").read_text() == "the only copy"
    with open_checkpoint(tmp_path / "new") as checkpoint:
        assert checkpoint.format == "safetensors"


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["convert", MODEL, str(tmp_path / "new"), "--to", "flax", "--max-shard-size", "100KB", "--dry-run"]
    code, out, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    assert "nothing was written" in out
    assert not (tmp_path / "new").exists()
    code, out, _ = run(capsys, *arguments, "--json")
    plan = json.loads(out)
    assert code == 0
    assert plan["fits"]
    assert len(plan["tensors"]) == 52
    assert {tensor["dtype"] for tensor in plan["tensors"]} == {"float32"}
    assert run(capsys, *arguments[:-1])[0] == 0
    written = {path.name: path.stat().st_size for path in (tmp_path / "new").iterdir()}
    assert set(plan["files"]) == set(written)
    assert sum(written.values()) <= plan["needed_bytes"] <= sum(written.values()) + 300_000
    for name in ("flax_model-00001-of-00003.msgpack", "flax_model-00003-of-00003.msgpack"):
        planned = sum(tensor["bytes"] for tensor in plan["tensors"] if tensor["file"] == name)
        assert planned <= written[name] < planned + 4096


@pytest.mark.parametrize("to", ["safetensors", "torch", "tf", "flax", "metaseq"])
def test_the_plan_is_never_less_than_the_files(tmp_path: Path, to: str):
    planned = plan_conversion(MODEL, tmp_path / "new", to).needed_bytes
    convert(MODEL, tmp_path / "new", to)
    assert sum(path.stat().st_size for path in (tmp_path / "new").iterdir()) <= planned


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(target, "free_bytes", lambda _: 100_000)
    monkeypatch.setattr(convert_module, "free_bytes", lambda _: 100_000)
    for extra in ([], ["--dry-run"]):
        code, out, err = run(capsys, "convert", MODEL, str(tmp_path / "new"), "--to", "torch", *extra)
        assert code == 1
        assert "of which the disk has 100,000 free. Make room" in err
        assert ("needs" in out) == bool(extra)
        assert not list(tmp_path.iterdir())


def test_convert_verifies_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    code, out, _ = run(capsys, "convert", MODEL, str(tmp_path / "a"), "--to", "tf", "--verify")
    assert code == 0
    assert "52 the same bits" in out
    assert out.endswith("holds\n")
    half = ["--dtype", "float16", "--json"]
    code, out, _ = run(capsys, "convert", MODEL, str(tmp_path / "b"), "--to", "tf", "--verify", *half)
    assert code == 0
    assert json.loads(out)["verification"]["checks"][0]["verdict"] == "rounded"
    write = safetensors_file.write

    def spoilt(path: Path, tensors: Any, read: Any) -> None:
        write(path, tensors, lambda name: read(name) * (0 if "fc1.bias" in name else 1))

    monkeypatch.setattr(safetensors_file, "write", spoilt)
    code, out, _ = run(capsys, "convert", MODEL, str(tmp_path / "c"), "--to", "safetensors", "--verify")
    assert code == 3
    assert out.endswith("DOES NOT HOLD\n")


def test_sharded_weights_can_be_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["convert", MODEL, str(tmp_path / "new"), "--to", "torch", "--max-shard-size", "100KB"]
    assert run(capsys, *arguments)[0] == 0
    assert run(capsys, *arguments, "--force")[0] == 0
