"""Conversions that are interrupted: what they leave, what they say, and how they are gone on with."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conversion import cli, convert
from conversion.formats import safetensors_file
from conversion.plan import TARGETS
from opt_common.errors import CheckpointError
from tests.kill_runs import SINGLE
from tests.paths import GOLDENS, ROOT

SOURCE = GOLDENS / "pre_ln/torch_bin"
SHARD = "40KB"


def convert_source(tmp_path: Path, source: Path = SOURCE, **options: Any) -> Path:
    """The source in several safetensors files."""
    target = tmp_path / "new"
    convert(source, target, "safetensors", **{"max_shard_size": SHARD, **options})
    return target


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.fixture
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run that nothing happens to writes."""
    return content(convert_source(tmp_path_factory.mktemp("whole")))


class Written:
    """Stands for the writer: counts the files, and fails at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int | None, error: BaseException) -> None:
        self.names: list[str] = []
        self._real, self._fail_at, self._error = safetensors_file.write, fail_at, error
        monkeypatch.setattr(safetensors_file, "write", self)

    def __call__(self, path: Path, tensors: Any, read: Any) -> None:
        if len(self.names) == self._fail_at:
            path.write_bytes(b"half")
            raise self._error
        self.names.append(path.name)
        self._real(path, tensors, read)


def interrupted(tmp_path: Path, at: int, error: BaseException | None = None, source: Path = SOURCE) -> Path:
    """The work that a run leaves which is interrupted while it writes a file."""
    error = error or KeyboardInterrupt()
    with pytest.MonkeyPatch.context() as patch:
        Written(patch, at, error)
        with pytest.raises(type(error)) as raised:
            convert_source(tmp_path, source)
    place = tmp_path / ".new.part"
    if place.exists():
        assert str(place) in " ".join(raised.value.__notes__)
    return place


# Resumed (metaseq#407 "convert to singleton hangs", levanter#506, OLMo-core#661: a conversion of hours starts anew)


def test_a_resumed_run_writes_only_what_was_not_finished(
    tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    assert interrupted(tmp_path, 3).exists()
    assert not (tmp_path / "new").exists()
    written = Written(monkeypatch, None, KeyboardInterrupt())
    target = convert_source(tmp_path, resume=True)
    shards = [name for name in expected if name.endswith(".safetensors")]
    assert written.names == shards[3:]
    assert content(target) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("harm", ["change", "cut", "remove"])
def test_a_finished_file_that_is_no_longer_whole_is_written_again(
    tmp_path: Path, expected: dict[str, bytes], harm: str, monkeypatch: pytest.MonkeyPatch
):
    first = interrupted(tmp_path, 3) / "files" / next(name for name in expected if name.endswith(".safetensors"))
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.unlink()
    if harm != "remove":
        first.write_bytes(data if harm == "change" else data[:-1])
    written = Written(monkeypatch, None, KeyboardInterrupt())
    assert content(convert_source(tmp_path, resume=True)) == expected
    assert first.name in written.names
    assert len(written.names) == 1 + sum(name.endswith(".safetensors") for name in expected) - 3


def test_without_resume_a_run_says_what_lies_there_and_leaves_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], expected: dict[str, bytes]
):
    place = interrupted(tmp_path, 3)
    before = content(place / "files")
    arguments = ["convert", str(SOURCE), str(tmp_path / "new"), "--to", "safetensors", "--max-shard-size", SHARD]
    assert cli.main(arguments) == 1
    said = capsys.readouterr().err
    assert f"{place} holds unfinished work: an earlier run was interrupted when 3 of {len(expected)} files" in said
    assert "--resume" in said
    assert "delete that directory" in said
    assert content(place / "files") == before
    assert cli.main([*arguments, "--resume"]) == 0
    assert content(tmp_path / "new") == expected


def test_resume_without_anything_to_resume_begins_from_the_start(tmp_path: Path, expected: dict[str, bytes]):
    assert content(convert_source(tmp_path, resume=True)) == expected


def test_a_source_that_changed_is_not_gone_on_with(tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(SOURCE, source)
    place = interrupted(tmp_path, 3, source=source)
    weights = source / "pytorch_model.bin"
    status = weights.stat()
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a careful copying program leaves it
    with pytest.raises(CheckpointError, match=r"the source is another one, or was changed\. Delete that directory"):
        convert_source(tmp_path, source, resume=True)
    assert place.exists()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"max_shard_size": "50KB"}])
def test_other_options_do_not_go_on_with_it(tmp_path: Path, options: dict[str, Any]):
    interrupted(tmp_path, 3)
    with pytest.raises(CheckpointError, match="the options ask for something else"):
        convert_source(tmp_path, resume=True, **options)


def test_another_version_does_not_go_on_with_it(tmp_path: Path):
    note = interrupted(tmp_path, 3) / "manifest.json"
    content = json.loads(note.read_text())
    content["task"]["program"] = "another"
    note.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="begun by another version"):
        convert_source(tmp_path, resume=True)
    note.write_text("{")
    with pytest.raises(CheckpointError, match=r"can't be read\. Delete that directory"):
        convert_source(tmp_path, resume=True)


def test_files_of_somebody_else_are_not_touched(tmp_path: Path):
    place = interrupted(tmp_path, 3)
    for foreign in (place / "notes.txt", place / "files" / "notes.txt"):
        foreign.write_text("not ours")
        with pytest.raises(CheckpointError, match=r"files of somebody else: notes\.txt\. Move them away"):
            convert_source(tmp_path, resume=True)
        assert foreign.read_text() == "not ours"
        foreign.unlink()
    convert_source(tmp_path, resume=True)


def test_two_runs_do_not_write_one_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = safetensors_file.write

    def write(path: Path, tensors: Any, read: Any) -> None:
        for resume in (False, True):
            with pytest.raises(CheckpointError, match="is being written by another process"):
                convert_source(tmp_path, resume=resume)
        real(path, tensors, read)

    monkeypatch.setattr(safetensors_file, "write", write)
    assert convert_source(tmp_path, max_shard_size=None).exists()


# Interrupted


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), OSError(28, "No space left on device")])
def test_an_interruption_says_what_it_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int
):
    Written(monkeypatch, at, type(error)(*error.args))
    arguments = ["convert", str(SOURCE), str(tmp_path / "new"), "--to", "safetensors", "--max-shard-size", SHARD]
    assert cli.main(arguments) == (cli.INTERRUPTED if isinstance(error, KeyboardInterrupt) else cli.FAILED)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    if at:
        assert "3 of " in said
        assert f"files are finished and kept in {tmp_path / '.new.part'}: run the same command with --resume" in said
        assert [path.name for path in tmp_path.iterdir()] == [".new.part"]
    else:
        assert "Nothing was left half-written." in said
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("kind", ["cut", "overwrite", "replace"])
def test_a_source_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
):
    source = tmp_path / "source"
    convert(SOURCE, source, name)
    weights = next(path for path in source.iterdir() if path.is_file() and path.suffix != ".json")
    real = safetensors_file.write

    def write(path: Path, tensors: Any, read: Any) -> None:
        if path.name.startswith("model-00002"):
            if kind == "replace":
                shutil.copy(weights, tmp_path / "other")
                (tmp_path / "other").replace(weights)
            elif kind == "cut":
                os.truncate(weights, 1000)
            else:
                with weights.open("r+b") as file:
                    file.seek(-2000, os.SEEK_END)
                    file.write(bytes(8))
        real(path, tensors, read)

    monkeypatch.setattr(safetensors_file, "write", write)
    with pytest.raises(CheckpointError, match=r"The source was changed while it was read: .*Run the command again"):
        convert_source(tmp_path, source)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize("at", range(9))
def test_a_replacement_that_is_interrupted_is_gone_on_with(
    tmp_path: Path, expected: dict[str, bytes], at: int, monkeypatch: pytest.MonkeyPatch
):
    """With --force the files move one after the other: CTranslate2's converter removes the directory instead."""
    target = tmp_path / "new"
    for path in convert_source(tmp_path).glob("*.safetensors"):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (target / "notes.txt").write_text("not ours")
    moved: list[Path] = []
    real = Path.replace

    def replace(self: Path, other: Path) -> Path:
        if other.parent == target:
            if len(moved) == at:
                raise KeyboardInterrupt
            moved.append(other)
        return real(self, other)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(KeyboardInterrupt) as raised:
            convert_source(tmp_path, force=True)
    assert "All files are finished and kept in" in " ".join(raised.value.__notes__)
    assert cli.main(["verify", str(target)]) == 1
    convert_source(tmp_path, resume=True)
    assert content(target) == {**expected, "notes.txt": b"not ours"}
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("sharded", [False, True])
def test_the_same_source_gives_the_same_bytes_in_every_format(tmp_path: Path, to: str, sharded: bool):
    if sharded and to in SINGLE:
        return
    split: dict[str, Any] = {"model_parts": 2} if to == "metaseq" else {"max_shard_size": SHARD}
    for name in ("a", "b"):
        convert(SOURCE, tmp_path / name, to, **(split if sharded else {}))
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_killed_out_of_disk_and_changed_at_random_moments():
    """`make kills` does this some hundred times."""
    command = [sys.executable, "-W", "error", "-m", "tests.kill_runs", "--kills", "6", "--full", "6", "--changes", "6"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ)
    assert result.returncode == 0, result.stderr
    outcomes = json.loads(result.stdout)["outcomes"]
    assert outcomes["killed"]
    assert outcomes["change noticed"]
