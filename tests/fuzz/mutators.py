"""One mutator for each format: it knows where the lengths, offsets, shapes, dtypes and paths of a file are."""

import io
import json
import random
import struct
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import msgpack
import numpy as np

from conversion.formats import hdf5_structure
from conversion.tensors import map_file
from tests.fuzz import pickles
from tests.fuzz.values import NUMBERS, corrupted, mutated_json, number, text, value

Mutator = Callable[[random.Random, bytes], bytes]


# safetensors


def safetensors(rng: random.Random, data: bytes) -> bytes:
    """Header: dtypes, shapes, offsets, names, metadata, its own length, its text; and the payload's length."""
    length = int.from_bytes(data[:8], "little")
    header, payload = json.loads(data[8 : 8 + length]), data[8 + length :]
    choice = rng.random()
    if choice < 0.1:
        return corrupted(rng, data, 0, 8 + length)
    if choice < 0.15:
        payload = corrupted(rng, payload)
    elif choice < 0.35:
        header = mutated_json(rng, header)
    else:
        for _ in range(rng.choice((1, 1, 2))):
            header = _entry(rng, header)
    written = json.dumps(header, allow_nan=True).encode("utf-8", "surrogatepass")
    if rng.random() < 0.08:
        written = rng.choice(
            (written[:-1] + b',"a":{},"a":{}}', b"[" * 30_000, b'{"a":' * 9_000, b"9" * 5_000, b"\xff" + written)
        )
    claimed = number(rng, len(written)) if rng.random() < 0.08 else len(written)
    return (claimed % (1 << 64)).to_bytes(8, "little") + written + payload


def _entry(rng: random.Random, header: dict[str, Any]) -> dict[str, Any]:
    """A header with one tensor's entry changed."""
    names = [name for name in header if name != "__metadata__" and isinstance(header[name], dict)]
    if not names:
        return header
    name, other = rng.choice(names), rng.choice(names)
    entry = dict(header[name])
    # It may have been changed before.
    if not isinstance(entry.get("shape"), list) or len(entry.get("data_offsets") or "") != 2:
        return header
    choice = rng.random()
    if choice < 0.2:
        entry["dtype"] = rng.choice(("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E5M2", "C64", value(rng)))
    elif choice < 0.5:
        shape = [*entry["shape"]]
        shape[rng.randrange(len(shape) or 1) : 1] = [number(rng, 8) for _ in range(rng.choice((0, 1, 1, 2, 9)))]
        entry["shape"] = rng.choice((shape, shape[::-1], [1] * rng.randrange(12) + shape, value(rng, shape)))
    elif choice < 0.8:
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            (
                [number(rng, begin), end],
                [begin, number(rng, end)],
                [end, begin],
                header[other].get("data_offsets"),
                [begin],
            )
        )
    elif choice < 0.9:
        return {**{key: item for key, item in header.items() if key != name}, text(rng, name): entry}
    else:
        return {**header, name: header[other], other: entry}
    return {**header, name: entry}


# msgpack


def flax(rng: random.Random, data: bytes) -> bytes:
    """Nesting, keys, extensions, shapes, dtypes, lengths of the parts of an array, and the heads of all values."""
    choice = rng.random()
    if choice < 0.15:
        return corrupted(rng, data)
    if choice < 0.4:
        return _msgpack_heads(rng, data)
    tree: Any = msgpack.unpackb(data, ext_hook=msgpack.ExtType, strict_map_key=False)
    if choice < 0.5:
        depth = rng.choice((1, 31, 32, 33, 1000))
        return b"".join((b"\x81\xa1a" * depth, msgpack.packb(tree)))
    try:
        return msgpack.packb(_msgpack_tree(rng, tree), unicode_errors="surrogatepass")
    except (ValueError, OverflowError, TypeError):  # what msgpack itself can't say
        return corrupted(rng, data)


def _msgpack_tree(rng: random.Random, tree: Any) -> Any:
    """A tree of arrays with one of its nodes changed."""
    if isinstance(tree, msgpack.ExtType):
        return _msgpack_array(rng, tree)
    if not isinstance(tree, dict) or not tree or rng.random() < 0.1:
        chunked = {"__msgpack_chunked_array__": True, "shape": {"0": number(rng)}, "chunks": {"0": tree}}
        return rng.choice((value(rng), chunked, {"a": tree}, [tree], {text(rng): tree, text(rng): tree}))
    key = rng.choice(list(tree))
    renamed = text(rng, key) if rng.random() < 0.15 else key
    return {
        (renamed if name == key else name): (_msgpack_tree(rng, item) if name == key else item)
        for name, item in tree.items()
    }


def _msgpack_array(rng: random.Random, array: msgpack.ExtType) -> Any:
    shape, dtype, numbers = msgpack.unpackb(array.data)
    choice = rng.random()
    if choice < 0.35:
        shape = rng.choice(
            ([number(rng, 8) for _ in shape], [*shape, 1], shape[:-1], shape[::-1], [0, *shape], value(rng))
        )
    elif choice < 0.55:
        dtype = rng.choice(
            ("float64", "float16", "int8", "bfloat16", "V2", "object", "bool", "complex64", text(rng), value(rng))
        )
    elif choice < 0.75:
        numbers = rng.choice((numbers[:-1], numbers * 2, b"", "text", [1, 2], None))
    elif choice < 0.85:
        return msgpack.ExtType(rng.choice((0, 1, 2, 3, 127)), array.data)
    else:
        return rng.choice((msgpack.ExtType(1, corrupted(rng, array.data)), shape, numbers, value(rng)))
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, numbers), unicode_errors="surrogatepass"))


def _msgpack_heads(rng: random.Random, data: bytes) -> bytes:
    """The first byte of some value, or the length behind it, changed."""
    heads = [place for place, byte in enumerate(data) if byte >= 0x80]
    place = rng.choice(heads)
    head = rng.choice(
        (0xC1, 0xC4, 0xC5, 0xC6, 0xC7, 0xC8, 0xC9, 0xD4, 0xD8, 0xD9, 0xDA, 0xDB, 0xDC, 0xDD, 0xDE, 0xDF, 0x8F, 0x9F)
    )
    length = rng.choice((b"", b"\xff", b"\xff\xff", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0"))
    return data[:place] + bytes([head]) + length + data[place + 1 + len(length) :]


# PyTorch's archives


def torch(rng: random.Random, data: bytes) -> bytes:
    """The pickle's operations; the archive's records; every field of its headers and of its directory."""
    choice = rng.random()
    if choice < 0.7:
        return _rezipped(rng, data, spoil_pickle=True)
    if choice < 0.8:
        return _rezipped(rng, data, spoil_pickle=False)
    return _zip_fields(rng, data)


def _rezipped(rng: random.Random, data: bytes, *, spoil_pickle: bool) -> bytes:
    """An archive of the same records, of which the pickle, or the list of records, is changed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    if spoil_pickle:
        records = [(name, pickles.mutated(rng, item) if name.endswith("data.pkl") else item) for name, item in records]
    else:
        place = rng.randrange(len(records))
        name, item = records[place]
        records[place : place + 1] = rng.choice(
            (
                [],
                [records[place]] * 2,
                [(text(rng, name), item)],
                [(name, corrupted(rng, item))],
                [(name, item[:-1])],
                [(name, b"")],
            )
        )
    method = zipfile.ZIP_DEFLATED if rng.random() < 0.03 else zipfile.ZIP_STORED
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, item in records:
            entry = zipfile.ZipInfo(name.encode("utf-8", "replace").decode()[:60_000] or "x")
            entry.compress_type = method
            archive.NameToInfo.pop(entry.filename, None)  # else a name that occurs twice gives a warning
            with archive.open(entry, "w") as record:
                record.write(item)
    return buffer.getvalue()


_ZIP_FIELDS: Mapping[bytes, tuple[tuple[int, int], ...]] = {
    b"PK\x03\x04": ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)),
    b"PK\x01\x02": (
        (6, 2),
        (8, 2),
        (10, 2),
        (16, 4),
        (20, 4),
        (24, 4),
        (28, 2),
        (30, 2),
        (32, 2),
        (34, 2),
        (38, 4),
        (42, 4),
    ),
    b"PK\x05\x06": ((4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
    b"PK\x06\x06": ((4, 8), (16, 4), (24, 8), (32, 8), (40, 8), (48, 8)),
    b"PK\x06\x07": ((4, 4), (8, 8), (16, 4)),
}
"""Offset and bytes of the fields of each kind of structure in an archive, by its signature."""


def _zip_fields(rng: random.Random, data: bytes) -> bytes:
    signature = rng.choice([kind for kind in _ZIP_FIELDS if kind in data])
    places = [place for place in range(len(data)) if data.startswith(signature, place)]
    spoiled = bytearray(data)
    for _ in range(rng.choice((1, 1, 2))):
        place = rng.choice(places)
        offset, size = rng.choice(_ZIP_FIELDS[signature])
        field = slice(place + offset, place + offset + size)
        other = rng.choice(places)
        near = int.from_bytes(data[other + offset : other + offset + size], "little")
        spoiled[field] = (rng.choice((near, number(rng, near))) % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(spoiled)


def torch_old(rng: random.Random, data: bytes) -> bytes:
    """The container before 1.6: five pickles, then the count and the numbers of each storage."""
    pieces: list[bytes] = []
    stream = io.BytesIO(data)
    import pickletools

    for _ in range(5):
        start = stream.tell()
        for _ in pickletools.genops(stream):
            pass
        pieces.append(data[start : stream.tell()])
    rest = data[stream.tell() :]
    if rng.random() < 0.75:
        place = rng.choice((0, 1, 2, 3, 3, 3, 3, 4, 4))
        pieces[place] = pickles.mutated(rng, pieces[place])
    elif rng.random() < 0.7:
        rest = struct.pack("<Q", number(rng, int.from_bytes(rest[:8], "little")) % (1 << 64)) + rest[8:]
    else:
        pieces.insert(rng.randrange(5), pieces.pop(rng.randrange(5)))
    return b"".join(pieces) + rest


# HDF5


class _Traced(hdf5_structure.File):
    """A file that notes which of its bytes are structure: those that the reader takes."""

    def __init__(self, buffer: Any) -> None:
        self.taken: set[tuple[int, int]] = set()
        super().__init__(buffer)

    def take(self, start: int, size: int) -> bytes:
        self.taken.add((start, size))
        return super().take(start, size)


_structures: dict[bytes, list[tuple[int, int]]] = {}


def _hdf5_structures(data: bytes) -> list[tuple[int, int]]:
    """Offset and bytes of every field that the reader looks at."""
    if data not in _structures:
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            traced = _Traced(map_file(Path(file.name)))
        objects = [traced.root]
        while objects:
            where = objects.pop()
            assert where.attributes is not None
            if where.is_group:
                objects += [traced.object(address) for address in where.children.values()]
            else:
                where.dataset()
        _structures[data] = sorted(traced.taken)
    return _structures[data]


def hdf5(rng: random.Random, data: bytes) -> bytes:
    """Any field of any structure; its address put in place of another one's; a file of other datasets altogether."""
    choice = rng.random()
    if choice < 0.15:
        return _hdf5_made(rng)
    structures = _hdf5_structures(data)
    spoiled = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        start, size = rng.choice(structures)
        if size > 8:  # several fields in one
            start, size = start + rng.randrange(size - 1), rng.choice((1, 2, 4, 8))
        near = int.from_bytes(data[start : start + size], "little")
        another = rng.choice(structures)[0] + rng.choice((-8, 0, 0, 0, 8))
        new = another if rng.random() < 0.4 else number(rng, near)
        spoiled[start : start + size] = (new % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(spoiled) if choice < 0.95 else corrupted(rng, bytes(spoiled))


def _hdf5_made(rng: random.Random) -> bytes:
    """A file that the HDF5 library wrote: attributes, dtypes, layouts, links and filters of all kinds."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=rng.choice(("earliest", ("earliest", "v108"), "latest"))) as file:
        group = file.create_group("model")
        _hdf5_dataset(rng, file, "model/a/kernel:0")
        if rng.random() < 0.3:
            links = (h5py.SoftLink("/model/a"), h5py.ExternalLink("/etc/passwd", "/x"), file, group)
            group["b"] = rng.choice(links)
        names: Any = rng.choice(
            (["a/kernel:0"], ["a/kernel:0"] * 2, ["b/a/kernel:0"], ["../x"], "a", 3, [1.0], ["é" * 9], [], ["b/" * 60])
        )
        file.attrs["layer_names"] = rng.choice((["model"], ["model"], ["model"], ["model", "model"], names))
        group.attrs["weight_names"] = names
    return buffer.getvalue()


def _hdf5_dataset(rng: random.Random, file: h5py.File, name: str) -> None:
    dtype = rng.choice(("f4", "f2", "f8", ">f4", "i8", "u1", "?", "c8", "f4,f4", "S5", "(2,)f4"))
    shape = rng.choice(((3, 4), (12,), (), (0,), (0, 1 << 40), (1,) * 9))
    kinds = (
        {},
        {"chunks": True},
        {"compression": "gzip"},
        {"shuffle": True},
        {"fletcher32": True},
        {"maxshape": (None,) * len(shape)},
        {"external": [("/etc/passwd", 0, 4000)]},
    )
    options = rng.choice(kinds) if shape and 0 not in shape else {}
    try:
        dataset = file.create_dataset(name, shape, np.dtype(dtype), **options)
        if rng.random() < 0.3:
            dataset.attrs["dtype"] = rng.choice(("bfloat16", "float16", 3, ["bfloat16"]))
    except (ValueError, TypeError, OSError):  # what the library can't write
        file.create_dataset(name, data=np.zeros(3, np.float32))


# JSON files


def json_file(rng: random.Random, data: bytes) -> bytes:
    """A `config.json` or an index: its values, keys, types, nesting and text."""
    choice = rng.random()
    if choice < 0.12:
        return corrupted(rng, data)
    if choice < 0.2:
        return rng.choice(
            (
                b"[" * 50_000,
                b'{"a":' * 20_000,
                b"9" * 5_000,
                b"null",
                b"[]",
                b"\xff\xfe{\0}\0",
                b"",
                data[:-3] + b'"a":1,"a":2}',
            )
        )
    document: Any = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        document = mutated_json(rng, document)
    return json.dumps(document, allow_nan=True, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")


def config(rng: random.Random, data: bytes) -> bytes:
    """A `config.json`: mostly one field of the model, with a value at which something could break."""
    if rng.random() < 0.4:
        return json_file(rng, data)
    document = json.loads(data)
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice([*document, "num_labels", "id2label", "label2id", "problem_type", "dtype", "architectures"])
        near = document.get(name)
        labels = {"0": rng.choice(("A", [1], None)), rng.choice(("1", "x", "9" * 5000, "²")): "B"}
        document[name] = rng.choice((value(rng, near), value(rng, near), rng.choice(NUMBERS), labels))
    return json.dumps(document, allow_nan=True).encode()
