"""Pickles taken apart into their operations, and put together differently."""

import functools
import pickle
import pickletools
import random
import struct

from tests.fuzz.values import NUMBERS, corrupted, number, text, value

GADGETS = (
    *(b"cos\nsystem\n", b"cposix\nsystem\n", b"cbuiltins\neval\n", b"c__builtin__\nexec\n", b"cbuiltins\ngetattr\n"),
    *(b"csubprocess\nPopen\n", b"cimportlib\nimport_module\n", b"crunpy\n_run_code\n", b"cpickle\nloads\n"),
    *(b"ctorch.storage\n_load_from_bytes\n", b"ctorch._utils\n_rebuild_sparse_tensor\n", b"ctorch\nload\n"),
    *(b"coperator\nattrgetter\n", b"cfunctools\npartial\n", b"cnumpy\nload\n", b"ctypes\nCodeType\n"),
    *(b"\x8c\x02os\x8c\x06system\x93", b"\x8c\x05torch\x8c\x0chub.load_urls\x93", b"\x8c\x08builtins\x8c\x04eval\x93"),
    *(
        b"(X\x01\0\0\0xios\nsystem\n",
        b"(cos\nsystem\nX\x01\0\0\0xo",
        b"\x82\x01",
        b"\x83\1\0",
        b"\x84\1\0\0\0",
        b"P1\n",
    ),
)
"""Operations that name, in every way that pickle knows, what could run code."""

KNOWN = (
    *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n", b"ccollections\nOrderedDict\n"),
    *(b"ctorch\nSize\n", b"ctorch\nFloatStorage\n", b"ctorch\nBFloat16Storage\n", b"ctorch\nQInt8Storage\n"),
    *(
        b"cargparse\nNamespace\n",
        b"comegaconf.dictconfig\nDictConfig\n",
        b"c_codecs\nencode\n",
        b"ccopyreg\n_reconstructor\n",
    ),
)

SIMPLE = tuple(
    bytes([code]) for code in b"()].}]NQRbdaetlsu012\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94\x97\x98"
)
"""Operations without an argument, among them those that no state dict needs."""


@functools.lru_cache(maxsize=100)
def operations(data: bytes) -> tuple[bytes, ...]:
    """The bytes of each operation of a pickle."""
    starts = [position for _, _, position in pickletools.genops(data)]
    return tuple(data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True))


def fragment(rng: random.Random) -> bytes:
    """One or a few operations that could stand anywhere."""
    makers = (_gadget, _gadget, _known, _simple, _number, _text, _value, _absurd)
    return rng.choice(makers)(rng)


def _gadget(rng: random.Random) -> bytes:
    gadget = rng.choice(GADGETS)
    return gadget + rng.choice((b"", b")R", b"(X\x04\0\0\0truetR", b"}b", b")\x81", b")}\x92"))


def _known(rng: random.Random) -> bytes:
    return rng.choice(KNOWN) + rng.choice((b"", b")R", b"(tR", b"]\x85R", b")\x81}b"))


def _simple(rng: random.Random) -> bytes:
    return rng.choice(SIMPLE)


def _number(rng: random.Random) -> bytes:
    return number_operation(rng, rng.choice(NUMBERS))


def _text(rng: random.Random) -> bytes:
    return text_operation(rng, text(rng))


def _value(rng: random.Random) -> bytes:
    # A whole value, without the first and the last operation of its pickle.
    return pickle.dumps(value(rng), 2)[2:-1]


def _absurd(rng: random.Random) -> bytes:
    return rng.choice(ABSURD)


ABSURD = (
    *(b"r\xff\xff\xff\xff", b"j\xff\xff\xff\xff", b"p99999999999999999999\n", b"h\0", b"h\1", b"q\0", b"g0\n"),
    *(b"\x8b\xff\xff\xff\x7f1", b"X\xff\xff\xff\xffa", b"\x8d" + b"\xff" * 8, b"\x8e" + b"\xff" * 7 + b"\x7f"),
    *(b"\x96" + b"\xff" * 8, b"T\xff\xff\xff\x7fa", b"I" + b"9" * 5000 + b"\n", b"L9" + b"0" * 5000 + b"L\n"),
    *(b"Fnan\n", b"G" + struct.pack(">d", float("inf")), b"S'\\x41'\n", b"V\\ud800\n"),
    *(b"]" * 3000, b")" + b"\x85" * 3000),
)
"""Operations with arguments that promise what no file holds, refer to what is not there, or nest without end."""


def number_operation(rng: random.Random, value: int) -> bytes:
    """An operation that pushes an integer, in one of the encodings that can hold it."""
    if 0 <= value < 256 and rng.random() < 0.5:
        return b"K" + bytes([value])
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    length = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([length]) + value.to_bytes(length, "little", signed=True) if length < 256 else b"K\0"


def text_operation(rng: random.Random, text: str) -> bytes:
    """An operation that pushes a text."""
    data = text.encode("utf-8", "surrogatepass")
    if len(data) < 256 and rng.random() < 0.3:
        return b"\x8c" + bytes([len(data)]) + data
    return b"X" + len(data).to_bytes(4, "little") + data


def mutated(rng: random.Random, data: bytes) -> bytes:
    """A pickle with one to three operations changed; now and then with a few bytes changed."""
    if rng.random() < 0.1:
        return corrupted(rng, data)
    parts = list(operations(data))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place = rng.randrange(len(parts))
        choice = rng.random()
        if choice < 0.45:
            parts[place] = _near(rng, parts[place])
        elif choice < 0.65:
            parts.insert(place, fragment(rng))
        elif choice < 0.75:
            parts[place] = fragment(rng)
        elif choice < 0.85:
            del parts[place]
        elif choice < 0.92:
            other = rng.randrange(len(parts))
            parts[place], parts[other] = parts[other], parts[place]
        else:
            run = parts[place : place + rng.choice((1, 2, 8, 40))]
            parts[place:place] = run * rng.choice((1, 1, 2, 50))
        if not parts:
            break
    return b"".join(parts)


def _near(rng: random.Random, operation: bytes) -> bytes:
    """An operation of the same kind with another argument."""
    code = operation[:1]
    if code in b"KMJ" and len(operation) <= 5:
        return number_operation(rng, number(rng, int.from_bytes(operation[1:], "little")))
    if code == b"X":
        return text_operation(rng, text(rng, operation[5:].decode("utf-8", "replace")))
    if code == b"c":
        return rng.choice((*GADGETS, *KNOWN))
    if len(operation) > 1:
        return corrupted(rng, operation, 1)
    return rng.choice(SIMPLE)
