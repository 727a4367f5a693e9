"""Damaged and hostile files: each gives one `CheckpointError`, executes nothing and allocates nothing it claims."""

import collections
import contextlib
import functools
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import msgpack
import numpy as np
import pytest

from conversion import open_checkpoint
from conversion.checkpoint import READERS
from conversion.formats import torch_pickle
from opt_common.errors import CheckpointError
from opt_common.hub import FORMATS
from tests.paths import GOLDENS

FOLDERS = {"safetensors": "safetensors", "torch": "torch_bin", "tf": "tf_h5", "flax": "flax_msgpack"}
LIMIT = 8 << 20
"""No hostile file of a few kilobytes may make the reader allocate more than this."""


def read_all(name: str, path: Path) -> None:
    """Open a file and read every tensor in it."""
    reader = READERS[name](path)
    for tensor, info in reader.tensors.items():
        array = reader.read(tensor)
        assert (array.dtype, array.shape) == (info.dtype, info.shape)


def refused(name: str, path: Path, match: str | None = None) -> None:
    """Reading a file, all of it, gives a `CheckpointError` and takes little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=match):
            read_all(name, path)
        assert tracemalloc.get_traced_memory()[1] < LIMIT
    finally:
        tracemalloc.stop()


# Any format


@pytest.mark.parametrize("name", FORMATS)
def test_an_empty_file(tmp_path: Path, name: str):
    (tmp_path / "x").write_bytes(b"")
    refused(name, tmp_path / "x", "is empty")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "content",
    [b"\0" * 5000, b"<html>not found</html>", b"\xff" * 64, b"PK\x03\x04" + b"\0" * 60],
    ids=["zeros", "web page", "ones", "zip without directory"],
)
def test_another_kind_of_file(tmp_path: Path, name: str, content: bytes):
    (tmp_path / "x").write_bytes(content)
    refused(name, tmp_path / "x")


@pytest.mark.parametrize("name", FORMATS)
def test_a_truncated_file(tmp_path: Path, name: str):
    whole = (GOLDENS / "pre_ln" / FOLDERS[name] / FORMATS[name].single).read_bytes()
    for length in (1, 7, 8, 9, 100, 1000, len(whole) // 2, len(whole) - 4096, len(whole) - 1):
        (tmp_path / "x").write_bytes(whole[:length])
        refused(name, tmp_path / "x")


@pytest.mark.parametrize("name", FORMATS)
def test_flipped_bytes_never_do_more_than_fail(tmp_path: Path, name: str):
    whole = (GOLDENS / "pre_ln" / FOLDERS[name] / FORMATS[name].single).read_bytes()
    random = np.random.default_rng(0)
    for _ in range(100):
        spoiled = bytearray(whole)
        # The structure is at the beginning of all formats, and for zip archives at the end too.
        start = 0 if random.random() < 0.7 else len(whole) - 4000
        for position in random.integers(start, start + 4000, 3):
            spoiled[position] = random.integers(256)
        (tmp_path / "x").write_bytes(spoiled)
        with contextlib.suppress(CheckpointError):
            read_all(name, tmp_path / "x")


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "x")
    refused("safetensors", tmp_path / "x", "not a regular file")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("where", ["../secret", "/etc/passwd", "a/b", "..", "", "shard\\x"])
def test_an_index_cannot_leave_its_directory(tmp_path: Path, name: str, where: str):
    shutil.copytree(GOLDENS / "sharded" / FOLDERS[name], tmp_path / "model")
    index = tmp_path / "model" / FORMATS[name].index
    content = json.loads(index.read_text())
    suffix = Path(FORMATS[name].single).suffix
    content["weight_map"][next(iter(content["weight_map"]))] = where + suffix if where not in ("", "..") else where
    index.chmod(0o644)
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="plain names"):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("name", FORMATS)
def test_an_index_that_promises_more_than_the_shards_hold(tmp_path: Path, name: str):
    shutil.copytree(GOLDENS / "sharded" / FOLDERS[name], tmp_path / "model")
    index = tmp_path / "model" / FORMATS[name].index
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    more = first.replace("embed_positions", "project_in").replace("lm_head", "qa_outputs")
    content["weight_map"][more] = content["weight_map"][first]
    index.chmod(0o644)
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="promises tensors that its shards do not hold"):
        open_checkpoint(tmp_path / "model")


# safetensors


def safetensors(header: Any, payload: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + payload


def entry(shape: Any = (4,), offsets: Any = (0, 16), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


SAFETENSORS = {
    "header of an exabyte": safetensors({"a": entry()}, length=1 << 60),
    "header of 99 MB": safetensors({"a": entry()}, length=99_000_000),
    "tensor of terabytes": safetensors({"a": entry((1 << 40,), (0, 1 << 42))}),
    "offsets beyond the end": safetensors({"a": entry((4,), (8, 24))}),
    "offset below zero": safetensors({"a": entry((4,), (-16, 0))}),
    "length below zero": safetensors({"a": entry((-4,), (0, 16))}),
    "length no integer": safetensors({"a": entry((4.0,), (0, 16))}),
    "length a boolean": safetensors({"a": entry((True, 4), (0, 16))}),
    "a hundred axes": safetensors({"a": entry([1] * 100 + [4], (0, 16))}),
    "shape too large": safetensors({"a": entry((8,), (0, 16))}),
    "same bytes twice": safetensors({"a": entry(), "b": entry()}),
    "overlap": safetensors({"a": entry((2,), (0, 8)), "b": entry((2,), (4, 12))}),
    "bytes left over": safetensors({"a": entry((2,), (0, 8))}),
    "gap at the start": safetensors({"a": entry((2,), (8, 16))}),
    "dtype unknown": safetensors({"a": entry(dtype="F8_E4M3")}),
    "dtype a list": safetensors({"a": entry(dtype=["F32"])}),
    "entry a list": safetensors({"a": [1, 2]}),
    "entry with more keys": safetensors({"a": {**entry(), "more": 1}}),
    "format of NumPy": safetensors({"__metadata__": {"format": "np"}, "a": entry()}),
    "format a list": safetensors({"__metadata__": {"format": ["pt"]}, "a": entry()}),
    "metadata with a list in it": safetensors({"__metadata__": {"format": "pt", "x": []}, "a": entry()}),
    "metadata a number": safetensors({"__metadata__": 3, "a": entry()}),
    "header a list": safetensors([1]),
    "deep lists": safetensors(b"[" * 100_000),
    "deep objects": safetensors(b'{"a":' * 50_000),
    "no UTF-8": safetensors(b"\xff\xfe{}"),
    "huge number": safetensors(b"9" * 5000),
    "key twice": safetensors(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{}}'),
}


@pytest.mark.parametrize("kind", SAFETENSORS)
def test_hostile_safetensors(tmp_path: Path, kind: str):
    (tmp_path / "x").write_bytes(SAFETENSORS[kind])
    refused("safetensors", tmp_path / "x")


# PyTorch


class Runs:
    """Pickles to a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def zipped(pickled: bytes, records: dict[str, bytes] | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        archive.writestr("x/data.pkl", pickled)
        for name, content in (records or {}).items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tensor(
    storage: str = "FloatStorage", size: str = "J\x10\0\0\0", shape: str = "(K\x10t", strides: str = "(K\1t"
) -> bytes:
    """A state dict with one tensor, its parts spelled as pickle opcodes."""
    text = (
        f"\x80\x02}}(X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\n{storage}\n"
        f"X\x01\0\0\0" + "0X\x03\0\0\0cpu" + f"{size}tQK\0{shape}{strides}\x89ccollections\nOrderedDict\n)RtRu."
    )
    return text.encode("latin-1")


CANARY = "canary-of-the-test"

GADGETS: dict[str, bytes] = {
    "os.system": pickle.dumps({"a": Runs(os.system, f"touch {CANARY}")}, 2),
    "posix.system by name": b"cposix\nsystem\n(X\x06\0\0\0touch xtR.",
    "eval": pickle.dumps(Runs(eval, f"open({CANARY!r}, 'w')"), 2),
    "exec": pickle.dumps(Runs(exec, "raise SystemExit"), 4),
    "subprocess": pickle.dumps(Runs(subprocess.check_output, ["touch", CANARY]), 2),
    "getattr": pickle.dumps(Runs(getattr, {}, "update"), 2),
    "import by name": b"c__builtin__\n__import__\n(X\x02\0\0\0ostR.",
    "nested name": b"\x80\x04\x8c\x05torch\x94\x8c\x0chub.load_urls\x94\x93.",
    "torch.load inside": b"ctorch.storage\n_load_from_bytes\n(C\x01xtR.",
    "torch._utils other": b"ctorch._utils\n_rebuild_wrapper_subclass\n)R.",
    "torch.serialization": b"ctorch.serialization\nload\n(X\x01\0\0\0xtR.",
    "numpy": b"cnumpy.testing._private.utils\nrunstring\n(X\x01\0\0\0x}tR.",
    "chain through a storage": b"ctorch\nFloatStorage\n(X\x01\0\0\0xtR.",
    "module as name": b"ctorch\n_utils._rebuild_tensor_v2\n)R.",
    "a class with __reduce__": pickle.dumps(Runs(print, "x"), 0),
    "getattr chain": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(X\x02\0\0\0ostRX\x06\0\0\0systemtR(X\1\0\0\0xtR.",
    "operator.attrgetter": b"coperator\nattrgetter\n(X\x06\0\0\0systemtR.",
    "functools.partial": pickle.dumps(Runs(functools.partial, os.system, "x"), 2),
    "importlib": b"cimportlib\nimport_module\n(X\x02\0\0\0ostR.",
    "runpy": b"crunpy\nrun_path\n(X\x01\0\0\0xtR.",
    "ctypes": b"cctypes\nCDLL\n(X\x01\0\0\0xtR.",
    "code object": b"ctypes\nCodeType\n)R.",
    "pickle inside a pickle": b"cpickle\nloads\n(C\x01.tR.",
    "codecs": b"c_codecs\nencode\n(X\x01\0\0\0xX\x06\0\0\0rot_13tR.",
    "pathlib": b"cpathlib\nPath.unlink\n(X\x01\0\0\0xtR.",
    "torch._utils sparse": b"ctorch._utils\n_rebuild_sparse_tensor\n)R.",
    "torch._utils through getattr": b"\x80\x04\x8c\x0ctorch._utils\x8c\x14sys.modules.os.system\x93(X\x01\0\0\0xtR.",
    "torch.jit": b"ctorch.jit\nload\n(X\x01\0\0\0xtR.",
    "known function with keywords": b"\x80\x04ccollections\nOrderedDict\n)}X\x01\0\0\0aK\1s\x92.",
    "NEWOBJ_EX": b"\x80\x04cos\nsystem\n(X\x01\0\0\0xt}\x92.",
    "BUILD with __setstate__": b"ccollections\nOrderedDict\n(X\x0c\0\0\0__setstate__cos\nsystem\ndb.",
    "EXT2": b"\x80\x02\x83\x01\0.",
    "EXT4": b"\x80\x02\x84\x01\0\0\0.",
    "BINPERSID of a call": b"cos\nsystem\n(X\x01\0\0\0xtRQ.",
    "DUP and POP": b"cos\nsystem\n200.",
    "out-of-band buffer": b"\x80\x05\x97\x98.",
    "INST": b"(X\x01\0\0\0xios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nX\x01\0\0\0xo.",
    "NEWOBJ": b"\x80\x02ctorch\nSize\n)\x81.",
    "EXT1": b"\x80\x02\x82\x01.",
    "BUILD of a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x08\0\0\0__code__X\x01\0\0\0xsb.",
    "PERSID": b"P1\n.",
    "call of a call": b"ccollections\nOrderedDict\n)R)R.",
    "call of a string": b"X\x06\0\0\0system)R.",
}


@pytest.mark.parametrize("gadget", GADGETS)
@pytest.mark.parametrize("container", ["zip", "old"])
def test_pickles_that_would_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gadget: str, container: str):
    """CVE-2025-32434, LlamaFactory#8379: OPT's own repositories have pickles, which need not be trusted to be read."""
    monkeypatch.chdir(tmp_path)
    pickled = GADGETS[gadget]
    old = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    (tmp_path / "x").write_bytes(zipped(pickled) if container == "zip" else old + pickled)
    before = set(sys.modules)
    refused("torch", tmp_path / "x", "nothing was executed|no state dict needs|calls|sets the attributes|pickle")
    assert [path.name for path in tmp_path.iterdir()] == ["x"], "nothing was executed"
    assert not {name for name in set(sys.modules) - before if name.startswith(("torch", "numpy.testing"))}


PICKLES = {
    "empty": b"",
    "stop only": b".",
    "no stop": b"\x80\x02}",
    "memo of four billion": b"\x80\x02}r\xff\xff\xff\xffh\x01.",
    "text of four gigabytes": b"\x80\x02X\xff\xff\xff\xffa.",
    "text of exabytes": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa.",
    "number of two gigabytes": b"\x80\x02\x8b\xff\xff\xff\x7f1.",
    "deep list": b"\x80\x02" + b"]" * 100_000 + b".",
    "deep tuple": b"\x80\x02)" + b"\x85" * 100_000 + b"}h\0.",
    "deep tuple as key": b"\x80\x02}(" + b")" + b"\x85" * 50_000 + b"K\x01u.",
    "odd number of items": b"\x80\x02}(K\x01K\x01K\x01u.",
    "key twice": b"\x80\x02}(X\x01\0\0\0aK\x01X\x01\0\0\0aK\x02u.",
    "mark for a dict": b"\x80\x02(t(u.",
    "number of ten thousand digits": b"I" + b"9" * 10_000 + b"\n.",
    "a list": pickle.dumps([1, 2], 2),
    "state inside": pickle.dumps({"model": {"a": 1}}, 2),
    "no tensor": pickle.dumps(collections.OrderedDict(a=3), 2),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_pickles_that_are_no_state_dict(tmp_path: Path, kind: str):
    (tmp_path / "x").write_bytes(zipped(PICKLES[kind]))
    refused("torch", tmp_path / "x")


RECORD = {"x/data/0": b"\0" * 64}


SPOILED = {
    "strides of zero": (tensor(shape="(M\0\x10M\0\x10t", strides="(K\0K\0t"), RECORD),
    "one element too many": (tensor(shape="(K\x11t"), RECORD),
    "stride too long": (tensor(shape="(K\x09t", strides="(K\2t"), RECORD),
    "stride below zero": (tensor(strides="(J\xff\xff\xff\xfft"), RECORD),
    "length below zero": (tensor(shape="(J\xff\xff\xff\xfft"), RECORD),
    "record too short": (tensor(shape="(t"), {"x/data/0": b"\0" * 60}),
    "strides missing": (tensor(shape="(K\1K\1t"), RECORD),
    "storage of exabytes": (tensor(size="\x8a\x08\0\0\0\0\0\0\0\x40"), RECORD),
    "record too short for its storage": (tensor(size="J\x20\0\0\0"), RECORD),
    "record absent": (tensor(), {}),
    "complex numbers": (tensor(storage="ComplexFloatStorage"), RECORD),
    "quantised numbers": (tensor(storage="QInt8Storage"), RECORD),
    "no storage class": (tensor(storage="Size"), RECORD),
    "two pickles": (tensor(), {**RECORD, "y/data.pkl": b"}."}),
    "big-endian": (tensor(), {**RECORD, "x/byteorder": b"big"}),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_tensors_that_do_not_lie_in_their_storage(tmp_path: Path, kind: str):
    (tmp_path / "x").write_bytes(zipped(tensor(), RECORD))
    assert READERS["torch"](tmp_path / "x").read("a").shape == (16,), "the tensor is a good one before it is spoiled"
    (tmp_path / "y").write_bytes(zipped(*SPOILED[kind]))
    refused("torch", tmp_path / "y")


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path):
    bomb = zipped(tensor(), {"x/data/0": b"\0" * (50 << 20)}, compression=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 100_000
    (tmp_path / "x").write_bytes(bomb)
    refused("torch", tmp_path / "x", "compressed")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_records_that_overlap_or_occur_twice(tmp_path: Path):
    buffer = io.BytesIO(zipped(tensor(), RECORD))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("x/data/0", b"\1" * 64)
    (tmp_path / "x").write_bytes(buffer.getvalue())
    refused("torch", tmp_path / "x", "occurs twice")

    content = bytearray(zipped(tensor(), {"x/data/0": b"\0" * 64, "x/data/1": b"\0" * 64}))
    directory = content.index(b"PK\x01\x02")
    first = content.index(b"PK\x01\x02", directory + 1)
    second = content.index(b"PK\x01\x02", first + 1)
    content[second + 42 : second + 46] = content[first + 42 : first + 46]  # the offset of the record
    (tmp_path / "x").write_bytes(content)
    refused("torch", tmp_path / "x", "overlaps")


def test_plain_containers_and_parameters_are_admitted():
    parameter = tensor()[:-2].replace(b"ctorch._utils", b"ctorch._utils\n_rebuild_parameter\n(ctorch._utils", 1)
    stored = torch_pickle.load(parameter + b"\x89NtRu.")["a"]
    assert stored == torch_pickle.load(tensor())["a"]
    assert stored.shape == (16,)
    plain = {"a": [1, (2, 3.5), None, True, "text", 1 << 70, -1], "b": {}, 3: collections.OrderedDict(c=(1, 2, 3, 4))}
    for protocol in range(2, 6):
        assert torch_pickle.load(pickle.dumps(plain, protocol)) == plain


# Flax


def array(shape: Any = (4,), dtype: Any = "float32", data: bytes = b"\0" * 16, code: int = 1) -> msgpack.ExtType:
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, data)))


def nested(depth: int) -> bytes:
    return b"\x81\xa1a" * depth + msgpack.packb(array())


MSGPACK = {
    "nested too deep": nested(40),
    "nested without end": nested(100_000),
    "map of four billion": b"\xdf\xff\xff\xff\xff",
    "text of four gigabytes": b"\x81\xdb\xff\xff\xff\xffa",
    "extension of four gigabytes": b"\x81\xa1a\xc9\xff\xff\xff\xff\x01",
    "bytes in place of an array": b"\x81\xa1a\xc6\xff\xff\xff\xff",
    "a single array": msgpack.packb(array()),
    "a list": msgpack.packb([array()]),
    "bytes left over": msgpack.packb({"a": array()}) + b"\xc0",
    "key a number": msgpack.packb({1: array()}),
    "key with a slash": msgpack.packb({"a/b": array()}),
    "key empty": msgpack.packb({"": array()}),
    "a number": msgpack.packb({"a": 3}),
    "nothing": msgpack.packb({"a": None}),
    "a list inside": msgpack.packb({"a": [array()]}),
    "complex number": msgpack.packb({"a": array(code=2)}),
    "shape too large": msgpack.packb({"a": array(shape=(8,))}),
    "shape of exabytes": msgpack.packb({"a": array(shape=(1 << 60, 1 << 60))}),
    "length below zero": msgpack.packb({"a": array(shape=(-4,))}),
    "too many axes": msgpack.packb({"a": array(shape=[1] * 15 + [4])}),
    "shape a text": msgpack.packb({"a": array(shape="4")}),
    "dtype object": msgpack.packb({"a": array(dtype="object")}),
    "dtype a number": msgpack.packb({"a": array(dtype=7)}),
    "data too short": msgpack.packb({"a": array(data=b"\0" * 15)}),
    "extension empty": msgpack.packb({"a": msgpack.ExtType(1, b"")}),
    "array without data": msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb((4,)))}),
    "array with more data": msgpack.packb(
        {"a": msgpack.ExtType(1, msgpack.packb(((4,), "float32", b"\0" * 16)) + b"\0")}
    ),
    "key twice": b"\x82" + 2 * (b"\xa1a" + msgpack.packb(array())),
    "key no UTF-8": b"\x81\xa1\xff" + msgpack.packb(array()),
    "chunks do not add up": msgpack.packb(
        {"a": {"__msgpack_chunked_array__": True, "shape": {"0": 1 << 50}, "chunks": {"0": array()}}}
    ),
    "no chunks": msgpack.packb({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 4}, "chunks": {}}}),
    "chunks misnumbered": msgpack.packb(
        {"a": {"__msgpack_chunked_array__": True, "shape": {"1": 4}, "chunks": {"0": array()}}}
    ),
    "chunks without shape": msgpack.packb(
        {"a": {"__msgpack_chunked_array__": True, "shape": 4, "chunks": {"0": array()}}}
    ),
}


@pytest.mark.parametrize("kind", MSGPACK)
def test_hostile_msgpack(tmp_path: Path, kind: str):
    (tmp_path / "x").write_bytes(MSGPACK[kind])
    refused("flax", tmp_path / "x")


# HDF5


def hdf5(build: Callable[[h5py.File, h5py.Group], None], names: list[str] | None = None) -> Callable[[Path], None]:
    """Write a file in the layout of a single file, whose one weight `a/b` is made by `build`."""

    def write(path: Path) -> None:
        with h5py.File(path, "w") as file:
            file.attrs["layer_names"] = ["model"]
            group = file.create_group("model")
            group.attrs["weight_names"] = names or ["a/b"]
            build(file, group)

    return write


def filled(file: h5py.File, name: str, **options: Any) -> None:
    file.create_dataset(name, data=np.zeros(1000, np.float32), **options)


def virtual(file: h5py.File, group: h5py.Group) -> None:
    layout = h5py.VirtualLayout((1000,), np.float32)
    layout[:] = h5py.VirtualSource("other.h5", "x", (1000,))
    group.create_virtual_dataset("a/b", layout)


def soft(file: h5py.File, group: h5py.Group) -> None:
    filled(file, "elsewhere")
    group["a/b"] = h5py.SoftLink("/elsewhere")


def loop(file: h5py.File, group: h5py.Group) -> None:
    group["a"] = file


def listed_twice(file: h5py.File, group: h5py.Group) -> None:
    filled(file, "model/a/b")


HDF5 = {
    "external link": hdf5(lambda file, group: group.__setitem__("a/b", h5py.ExternalLink("/etc/passwd", "/x"))),
    "soft link": hdf5(soft),
    "virtual": hdf5(virtual),
    "external storage": hdf5(
        lambda file, group: file.create_dataset("model/a/b", (1000,), "f4", external=[("/etc/passwd", 0, 4000)])
    ),
    "compressed": hdf5(lambda file, group: filled(file, "model/a/b", compression="gzip")),
    "chunked": hdf5(lambda file, group: filled(file, "model/a/b", chunks=(10,))),
    "promises terabytes": hdf5(lambda file, group: file.create_dataset("model/a/b", (1 << 40,), "f4") and None),
    "text": hdf5(lambda file, group: file.create_dataset("model/a/b", data=["x"]) and None),
    "big-endian": hdf5(lambda file, group: file.create_dataset("model/a/b", data=np.zeros(9, ">f4")) and None),
    "compound": hdf5(lambda file, group: file.create_dataset("model/a/b", data=np.zeros(9, "f4,f4")) and None),
    "complex": hdf5(lambda file, group: file.create_dataset("model/a/b", data=np.zeros(9, "c8")) and None),
    "group for a dataset": hdf5(lambda file, group: group.create_group("a/b") and None),
    "absent": hdf5(lambda file, group: None),
    "loop": hdf5(loop, ["/".join(["a", "model"] * 100)]),
    "dots": hdf5(listed_twice, ["../model/a/b"]),
    "absolute": hdf5(listed_twice, ["/model/a/b"]),
    "twice": hdf5(listed_twice, ["a/b", "a/b"]),
}


@pytest.mark.parametrize("kind", HDF5)
def test_hostile_hdf5(tmp_path: Path, kind: str):
    HDF5[kind](tmp_path / "x")
    refused("tf", tmp_path / "x")


def test_attributes_of_hdf5_are_checked(tmp_path: Path):
    for number, value in enumerate([3, [1, 2], np.zeros((2, 2)), "model", b"model"]):
        with h5py.File(tmp_path / f"{number}", "w") as file:
            file.attrs["layer_names"] = value
        refused("tf", tmp_path / f"{number}")
    with h5py.File(tmp_path / "none", "w") as file:
        filled(file, "x")
    refused("tf", tmp_path / "none", "layer_names")
