"""Numbers, texts and JSON values at which parsers break."""

import random
from typing import Any

NUMBERS = (
    *(0, 1, 2, 3, 7, 8, 9, 31, 63, 64, 127, 128, 255, 256, 1023, 4096, 65535, 65536, 1 << 20),
    *((1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 40) + 8, (1 << 53) + 1, (1 << 62) - 1, 1 << 62),
    *((1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 1 << 200),
)

TEXTS = (
    *("", "a", ".", "..", "../x", "../../etc/passwd", "/etc/passwd", "a/b", "a\\b", "C:\\x", "~", "\0", "a\0b", "\n"),
    *("\ud800", "\U0001f600", "é", "-1", "0", "x" * 300, "x" * 70_000, "%s%n", "__metadata__", "__class__"),
    *("model.decoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight", "model.decoder.layers"),
    *("model.decoder.layers.0.fc1.weight", "model.decoder.layers.99999999.fc1.weight", "score.weight"),
    *("decoder.version", "qkv_proj", "float32", "bfloat16", "object", "F32", "F64", "BF16", "pt", "tf", "flax", "np"),
    *("model.safetensors", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "config.json", "nan", "\x1b[2J"),
)


def number(rng: random.Random, near: int = 0) -> int:
    """An integer: near a given one, at the edge of a machine type, or anything."""
    choice = rng.random()
    if choice < 0.35:
        return near + rng.choice((-8, -2, -1, 1, 2, 4, 8))
    if choice < 0.45:
        return near * rng.choice((2, 3, 1 << 10, 1 << 30))
    if choice < 0.9:
        return rng.choice(NUMBERS)
    return -rng.choice(NUMBERS)


def text(rng: random.Random, near: str = "") -> str:
    """A text: a bad one, or a given one with a character changed."""
    if not near or rng.random() < 0.6:
        return rng.choice(TEXTS)
    position = rng.randrange(len(near))
    return near[:position] + rng.choice(("", "x", ".", "/", "\0", near)) + near[position + rng.randrange(2) :]


def value(rng: random.Random, near: Any = None) -> Any:
    """A JSON value of any type, or one near a given one."""
    choice = rng.random()
    if choice < 0.5 and isinstance(near, int) and not isinstance(near, bool):
        return number(rng, near)
    if choice < 0.5 and isinstance(near, str):
        return text(rng, near)
    kinds = (None, True, False, 0.5, -1.0, 1e308, float("nan"), float("inf"), [], {}, [near], {"a": near}, [[]] * 9)
    return rng.choice((*kinds, number(rng), text(rng), [number(rng), number(rng)], {text(rng): number(rng)}))


def corrupted(rng: random.Random, data: bytes, start: int = 0, end: int | None = None) -> bytes:
    """The bytes with some of them, from `start` to `end`, changed, cut out or doubled."""
    end = len(data) if end is None else end
    if end <= start:
        return data
    spoiled = bytearray(data)
    choice = rng.random()
    if choice < 0.6:
        for _ in range(rng.choice((1, 1, 2, 3, 8))):
            spoiled[rng.randrange(start, end)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    elif choice < 0.7:
        del spoiled[rng.randrange(start, end) :]
    else:
        first = rng.randrange(start, end)
        last = min(end, first + rng.choice((1, 2, 4, 8, 64)))
        spoiled[first:last] = b"" if choice < 0.85 else bytes(spoiled[first:last]) * 2
    return bytes(spoiled)


def mutated_json(rng: random.Random, document: Any) -> Any:
    """A JSON document with one value or key changed, anywhere in it."""
    if isinstance(document, dict) and document and rng.random() < 0.9:
        key = rng.choice(list(document))
        rest = {name: item for name, item in document.items() if name != key}
        choice = rng.random()
        if choice < 0.1:
            return rest
        if choice < 0.2:
            return {text(rng, key): document[key], **rest}
        if choice < 0.3:
            return {**document, text(rng, key): document[rng.choice(list(document))]}
        return {name: mutated_json(rng, item) if name == key else item for name, item in document.items()}
    if isinstance(document, list) and document and rng.random() < 0.8:
        position = rng.randrange(len(document))
        middle = rng.choice(([], [document[position]] * 2, [mutated_json(rng, document[position])]))
        return [*document[:position], *middle, *document[position + 1 :]]
    return value(rng, document)
