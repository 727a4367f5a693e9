"""Small files that stand for a lot, and paths that lead elsewhere: nothing is allocated that the file does not hold."""

import contextlib
import io
import json
import os
import pickle
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import msgpack
import numpy as np
import pytest

from conversion import convert, open_checkpoint
from conversion.checkpoint import READERS, checked_parameters
from opt_common.config import OPTConfig
from opt_common.errors import CheckpointError, ConfigError
from opt_common.hub import FORMATS
from opt_common.params import parameter_table
from tests.paths import GOLDENS
from tests.test_conversion_hostile import FOLDERS, array, entry, hdf5, safetensors, zipped

CONSTANT = 128 << 20
"""Bytes that reading may take beyond twice the file: what the longest header or pickle that is read at all can take."""

SECONDS = 60


def is_refused(read: Callable[[], Any], size: int, kind: type[Exception] = CheckpointError) -> str:
    """What is said of a file that is refused in time and within the memory; the reading is done by `read`."""
    tracemalloc.start()
    started = time.monotonic()
    try:
        with pytest.raises(kind) as caught:
            read()
        assert tracemalloc.get_traced_memory()[1] <= 2 * size + CONSTANT
        assert time.monotonic() - started < SECONDS
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 10_000
    return str(caught.value)


def pickled_text(size: int) -> bytes:
    """A pickle of one text whose characters take four bytes each in memory, and one in the file."""
    text = "\U0001f600" + "a" * size
    return b"\x80\x02X" + struct.pack("<I", len(text.encode())) + text.encode() + b"."


def zip_directory(count: int) -> bytes:
    """An archive that is little but its directory."""
    record = b"PK\x03\x04" + bytes(26)
    entries = (
        b"PK\x01\x02" + bytes(24) + struct.pack("<H", 6) + bytes(16) + b"%06d" % number for number in range(count)
    )
    directory = b"".join(entries)
    end = struct.pack("<4s4xHHIIH", b"PK\x05\x06", min(count, 65535), min(count, 65535), len(directory), len(record), 0)
    wide = struct.pack("<4s20xQQQQ", b"PK\x06\x06", count, count, len(directory), len(record))
    locator = struct.pack("<4s4xQ4x", b"PK\x06\x07", len(record) + len(directory))
    return record + directory + (wide + locator if count > 65535 else b"") + end


PAIRS = pickle.dumps([(f"{number}", 1) for number in range(10_000)], 2)[2:-1]

BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "safetensors: a header of empty lists": (
        "safetensors",
        lambda: safetensors(b'{"a":[' + b"[]," * 1_000_000 + b"0]}"),
    ),
    "safetensors: a header of 10 MB": ("safetensors", lambda: safetensors(b'{"a":[' + b"[]," * 3_300_000 + b"0]}")),
    "safetensors: 10,000 tensors": (
        "safetensors",
        lambda: safetensors({f"{number}": entry((0,), (0, 0)) for number in range(10_000)}),
    ),
    "pickle: many dicts": ("torch", lambda: zipped(b"\x80\x02" + b"}" * 600_000 + b".")),
    "pickle: many dicts, each remembered": ("torch", lambda: zipped(b"\x80\x04" + b"}\x94" * 600_000 + b".")),
    "pickle: one list made into a hundred thousand dicts": (
        "torch",
        lambda: zipped(
            b"\x80\x02" + PAIRS + b"q\xff0ccollections\nOrderedDict\nq\xfe" + b"h\xfeh\xff\x85R" * 100_000 + b"."
        ),
    ),
    "pickle: a text four times its length": ("torch", lambda: zipped(pickled_text(50_000_000))),
    "pickle: a line of 50 MB": ("torch", lambda: zipped(b"V" + b"a" * 50_000_000 + b"\n.")),
    "pickle of the old container: a text": ("torch", lambda: pickled_text(50_000_000)),
    "pickle: tuples of tuples": ("torch", lambda: zipped(b"\x80\x02)" + b"2\x86" * 400_000 + b".")),
    "pickle: tuples that double by the memo": ("torch", lambda: zipped(b"\x80\x02)q\0" + b"h\0h\0\x86q\0" * 60 + b".")),
    "zip: a directory of a million records": ("torch", lambda: zip_directory(1_000_000)),
    "zip: a directory of fifty thousand": ("torch", lambda: zip_directory(50_000)),
    "msgpack: one long key around many arrays": (
        "flax",
        lambda: msgpack.packb({"k" * 200_000: {f"{number}": array() for number in range(20_000)}}),
    ),
    "msgpack: many keys": (
        "flax",
        lambda: msgpack.packb({f"{number}": array((0,), data=b"") for number in range(60_000)}),
    ),
    "msgpack: a shape of many axes": (
        "flax",
        lambda: msgpack.packb(
            {
                "a": {
                    "__msgpack_chunked_array__": True,
                    "shape": {f"{n}": 1 for n in range(10**5)},
                    "chunks": {"0": array()},
                }
            }
        ),
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb(tmp_path: Path, bomb: str):
    name, make = BOMBS[bomb]
    (tmp_path / "x").write_bytes(make())

    def read() -> None:
        for tensor in READERS[name](tmp_path / "x").tensors:
            raise CheckpointError(f"{tensor} is in a file that was to be refused or to hold nothing of size")

    is_refused(read, (tmp_path / "x").stat().st_size)


# HDF5


def many_names_of_one_text(path: Path) -> None:
    """Thousands of references to one long text."""
    count, length = 4000, 60_000
    with h5py.File(path, "w") as file:
        file.attrs.create("layer_names", ["n" * length, *["x"] * (count - 1)], dtype=h5py.string_dtype())
    content = bytearray(path.read_bytes())
    first = content.index(struct.pack("<I", length))
    content[first : first + 16 * count] = bytes(content[first : first + 16]) * count
    path.write_bytes(content)


def long_group_name(path: Path) -> None:
    with h5py.File(path, "w") as file:
        group = file.create_group("g" * 60_000)
        file.attrs.create("layer_names", ["g" * 60_000], dtype=h5py.string_dtype())
        group.attrs.create("weight_names", [f"{number}" for number in range(4000)], dtype=h5py.string_dtype())


def group_in_itself(path: Path) -> None:
    def build(file: h5py.File, group: h5py.Group) -> None:
        group["loop"] = group
        file.create_dataset("model/x", data=np.zeros(3, np.float32))

    hdf5(build, ["/".join(["loop"] * 40) + "/x"])(path)


def a_tree_that_is_its_own_child(path: Path) -> None:
    """The tree of a group's members, whose first child is the tree itself."""
    hdf5(lambda file, group: file.create_dataset("model/a/b", data=np.zeros(3, np.float32)) and None)(path)
    content = bytearray(path.read_bytes())
    tree = content.index(b"TREE")
    content[tree + 5] = 1  # a level above the leaves
    content[tree + 32 : tree + 40] = tree.to_bytes(8, "little")
    path.write_bytes(content)


def two_datasets_over_each_other(path: Path) -> None:
    def build(file: h5py.File, group: h5py.Group) -> None:
        for name in "ab":
            file.create_dataset(f"model/{name}", data=np.full(1000, ord(name), np.float32))

    hdf5(build, ["a", "b"])(path)
    content = bytearray(path.read_bytes())
    first, second = (content.index(np.full(3, ord(name), np.float32).tobytes()) for name in "ab")
    place = content.index(second.to_bytes(8, "little"))
    content[place : place + 8] = (first + 8).to_bytes(8, "little")
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (many_names_of_one_text, "500 bytes"),
        (long_group_name, "500 bytes"),
        (group_in_itself, "more than 32 deep"),
        (a_tree_that_is_its_own_child, "is no tree"),
        (two_datasets_over_each_other, "those of another dataset too"),
    ],
)
def test_an_hdf5_file_that_refers_to_itself(tmp_path: Path, make: Callable[[Path], None], said: str):
    make(tmp_path / "x")
    assert said in is_refused(lambda: READERS["tf"](tmp_path / "x"), (tmp_path / "x").stat().st_size)


# Zip archives


def test_every_field_of_an_archive_is_checked(tmp_path: Path):
    """The numbers of the directory's end, and of an entry, each made too large and too small."""
    whole = bytearray(zipped(b"\x80\x02}.", {"x/data/0": bytes(64)}))
    end, entry_at = whole.index(b"PK\x05\x06"), whole.index(b"PK\x01\x02")
    fields = {"count": (end + 10, 2), "size": (end + 12, 4), "start": (end + 16, 4), "comment": (end + 20, 2)}
    fields |= {
        "packed": (entry_at + 20, 4),
        "bytes": (entry_at + 24, 4),
        "name": (entry_at + 28, 2),
        "header": (entry_at + 42, 4),
    }
    for name, (place, size) in fields.items():
        for change in (-1, 1, 1 << 8 * size - 1):
            spoiled = bytearray(whole)
            number = (int.from_bytes(whole[place : place + size], "little") + change) % (1 << 8 * size)
            spoiled[place : place + size] = number.to_bytes(size, "little")
            (tmp_path / "x").write_bytes(spoiled)
            try:
                READERS["torch"](tmp_path / "x")
            except CheckpointError:
                continue
            pytest.fail(f"{name} changed by {change} is not noticed")


def test_an_archive_of_more_than_32_bits_is_read(tmp_path: Path):
    """What PyTorch writes for any file: the numbers stand in a second end of the directory."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, archive.open("x/data.pkl", "w", force_zip64=True) as record:
        record.write(b"\x80\x02}.")
    content = bytearray(buffer.getvalue())
    entry_at, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    wide = struct.pack("<HHQQ", 1, 16, 4, 4)
    content[entry_at + 20 : entry_at + 28] = b"\xff" * 8
    content[entry_at + 30 : entry_at + 32] = len(wide).to_bytes(2, "little")
    name_end = entry_at + 46 + len("x/data.pkl")
    directory = bytes(content[entry_at:name_end]) + wide
    tail = struct.pack("<4s20xQQQQ", b"PK\x06\x06", 1, 1, len(directory), entry_at)
    tail += struct.pack("<4s4xQ4x", b"PK\x06\x07", entry_at + len(directory))
    tail += struct.pack("<4s4xHHIIH", b"PK\x05\x06", 65535, 65535, (1 << 32) - 1, (1 << 32) - 1, 0)
    assert end > entry_at
    (tmp_path / "x").write_bytes(bytes(content[:entry_at]) + directory + tail)
    assert READERS["torch"](tmp_path / "x").tensors == {}


# Tensors


@pytest.mark.parametrize("name", ["safetensors", "flax"])
def test_an_axis_of_no_length_beside_one_of_exabytes(tmp_path: Path, name: str):
    shape = (0, 1 << 61)
    content = {
        "safetensors": safetensors({"a": entry(shape, (0, 0))}, b""),
        "flax": msgpack.packb({"a": array(shape, data=b"")}),
    }[name]
    (tmp_path / "x").write_bytes(content)
    is_refused(lambda: READERS[name](tmp_path / "x"), len(content))


def test_strides_that_nobody_walks_may_be_any_number(tmp_path: Path):
    from tests.test_conversion_hostile import RECORD, tensor

    state = tensor(shape="(K\x10K\1t", strides="(K\1\x8a\x08\0\0\0\0\0\0\0\x20t")
    (tmp_path / "x").write_bytes(zipped(state, RECORD))
    assert READERS["torch"](tmp_path / "x").read("a").shape == (16, 1)


@pytest.mark.parametrize("name", ["model.decoder.\x1b[2Jx", "a\nb", "\ud800"])
def test_a_name_that_cannot_be_printed(tmp_path: Path, name: str):
    content = safetensors({name: entry()})
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "config.json").write_text(OPTConfig().to_json())
    assert is_refused(lambda: open_checkpoint(tmp_path), len(content)).isprintable()


# config.json and the index

CONFIGS = {
    "a billion layers": ('{"num_hidden_layers": 1000000000}', "1000000000, but the weights"),
    "a billion labels": ('{"num_labels": 1000000000}', "have to be named"),
    "a number of 5,000 digits": ('{"vocab_size": ' + "9" * 5000 + "}", "not readable"),
    "a label of 5,000 digits": ('{"id2label": {"' + "9" * 5000 + '": "A"}}', "expected a name for each output"),
    "a label that is a list": ('{"id2label": {"0": ["A"]}}', "label2id is None"),
    "an output that is a list": ('{"label2id": {"A": [0]}}', "num_labels is 0"),
    "a key twice": ('{"vocab_size": 512, "vocab_size": 513}', "a key occurs twice"),
    "nested without end": ("[" * 100_000, "not readable"),
    "half a character": ('{"x": "\\ud800"}', "not readable"),
    "an infinite deviation": ('{"init_std": Infinity}', "init_std is inf"),
    "no UTF-8": ("\udcff", "not readable"),
    "a list": ("[]", "expected a JSON object"),
    "10 MB": ('{"x": "' + "a" * 10_000_000 + '"}', "expected 4000000 at most"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_hostile_configuration(tmp_path: Path, kind: str):
    content, said = CONFIGS[kind]
    (tmp_path / "model.safetensors").symlink_to(GOLDENS / "pre_ln/safetensors/model.safetensors")
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))

    def read() -> None:
        with open_checkpoint(tmp_path) as checkpoint:
            checked_parameters(checkpoint, parameter_table(checkpoint.config))

    message = is_refused(read, len(content), (ConfigError, CheckpointError))  # pyright: ignore
    assert said in message


def test_a_pipe_in_place_of_a_configuration(tmp_path: Path):
    (tmp_path / "model.safetensors").symlink_to(GOLDENS / "pre_ln/safetensors/model.safetensors")
    os.mkfifo(tmp_path / "config.json")
    assert "not a regular file" in is_refused(lambda: open_checkpoint(tmp_path), 0, ConfigError)


@pytest.mark.parametrize("depth", [400, 900, 960, 980, 1100])
def test_what_is_nested_too_deep_to_be_written_again_is_an_error(tmp_path: Path, depth: int):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/model.safetensors").symlink_to(GOLDENS / "pre_ln/safetensors/model.safetensors")
    config = (GOLDENS / "pre_ln/safetensors/config.json").read_text()
    (tmp_path / "a/config.json").write_text(config.replace("{", '{"x": ' + "[" * depth + "]" * depth + ",", 1))
    # How deep Python goes depends on who called: what it can't do is an error, and nothing else comes of it.
    with contextlib.suppress(ConfigError):
        convert(tmp_path / "a", tmp_path / "b", "torch")
        assert depth < 1000


def test_a_configuration_made_in_python_that_is_no_json():
    nested: list[Any] = []
    for _ in range(3000):
        nested = [nested]
    with pytest.raises(ConfigError, match="nested too deep"):
        OPTConfig(extra={"x": nested}).to_json()


INDEXES = {
    "a shard twice": '{"weight_map": {"a": "SHARD", "a": "SHARD"}}',
    "10 MB": '{"weight_map": {"a": "SHARD", "b": "' + "a" * 10_000_000 + '"}}',
    "a number of 5,000 digits": '{"weight_map": {"a": "SHARD"}, "metadata": ' + "9" * 5000 + "}",
    "nested without end": '{"weight_map":' * 50_000,
    "itself": '{"weight_map": {"a": "INDEX"}}',
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", INDEXES)
def test_a_hostile_index(tmp_path: Path, name: str, kind: str):
    files = FORMATS[name]
    source = GOLDENS / "sharded" / FOLDERS[name]
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = next(path.name for path in source.iterdir() if files.is_shard(path.name))
    (tmp_path / files.index).write_text(INDEXES[kind].replace("SHARD", shard).replace("INDEX", files.index))
    is_refused(lambda: open_checkpoint(tmp_path), sum(path.stat().st_size for path in tmp_path.iterdir()))
    is_refused(lambda: open_checkpoint(tmp_path / files.index), sum(path.stat().st_size for path in tmp_path.iterdir()))


# Links


def linked(target: Path, source: Path, name: str, to: Callable[[Path], Path]) -> Path:
    """A copy of a sharded checkpoint in which the files whose names begin so are links."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.name.startswith(name):
            (target / path.name).symlink_to(to(path))
        else:
            (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("name", FORMATS)
def test_a_shard_that_is_a_link_out_of_the_directory(tmp_path: Path, name: str):
    source = GOLDENS / "sharded" / FOLDERS[name]
    stem, index = FORMATS[name].single.rpartition(".")[0], FORMATS[name].index
    out = linked(tmp_path / "out", source, f"{stem}-", lambda path: path)
    for path in (out, out / index):
        with pytest.raises(CheckpointError, match="links out of it in place of"):
            open_checkpoint(path)
    # As in the hub's cache, and where a user has made a directory of links: index and shards lead to one place.
    with open_checkpoint(linked(tmp_path / "all", source, "", lambda path: path)) as checkpoint:
        assert len(checkpoint.files) > 1
    (tmp_path / "secret").mkdir()
    devices = linked(tmp_path / "devices", source, f"{stem}-", lambda _: Path("/dev/zero"))
    pipes = linked(tmp_path / "self", source, f"{stem}-", lambda path: Path(path.name))
    folders = linked(tmp_path / "folders", source, f"{stem}-", lambda _: tmp_path / "secret")
    for directory in (devices, pipes, folders):
        is_refused(lambda directory=directory: open_checkpoint(directory), 0)


def test_the_documents_beside_a_checkpoint_are_not_named_by_it(tmp_path: Path):
    """Nothing in a checkpoint says which files go along: only files of known names beside it do."""
    source = tmp_path / "a"
    source.mkdir()
    (source / "model.safetensors").symlink_to(GOLDENS / "pre_ln/safetensors/model.safetensors")
    config = json.loads((GOLDENS / "pre_ln/safetensors/config.json").read_text())
    config |= {"_name_or_path": "/etc", "auto_map": {"AutoModel": "../x.py"}, "tokenizer_file": "/etc/passwd"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "modeling.py").write_text("raise SystemExit")
    convert(source, tmp_path / "b", "torch")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["config.json", "pytorch_model.bin"]
