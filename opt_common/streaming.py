"""Text as it is produced: ids go in, whole characters come out.

A token of byte-level BPE may end in the middle of a character, and a stop string in the middle of a token. What can't
be shown yet is held back, so that the pieces, joined, are exactly the text of all ids at once.
"""

import codecs
import contextlib
import functools
import queue
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from opt_common.errors import GenerationError, TokenizerError
from opt_common.generation_config import GenerationConfig
from opt_common.tokenizer import OPTTokenizer, clean_up


class TextDecoder:
    """Ids to text, piece by piece. The pieces, joined, are what `OPTTokenizer.decode` gives for all ids at once.

    With stop strings, the text ends right before the first of them, and what comes after is dropped.

    Args:
        tokenizer: whose ids they are.
        skip_special_tokens: leave special tokens out.
        clean_up_tokenization_spaces: as in `OPTTokenizer.decode`.
        stop_strings: texts that end the text.
        prompt: ids in front of the text: a stop string may begin in them.

    Attributes:
        stopped: whether a stop string has been met.

    Raises:
        TokenizerError: for a tokenizer whose tokens are not bytes.
    """

    def __init__(
        self,
        tokenizer: OPTTokenizer,
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        stop_strings: Iterable[str] = (),
        prompt: Iterable[int] = (),
    ) -> None:
        self.stopped = False
        self._tokens = TokenBytes(tokenizer)
        self._skipped = tokenizer.skipped_ids() if skip_special_tokens else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        cleans = tokenizer.clean_up_tokenization_spaces
        self._cleans = cleans if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        self._unclean = ""
        self._stops = tuple(text.encode() for text in stop_strings)
        self._reach = max(map(len, self._stops), default=1) - 1
        # Bytes that are held back, and which of them are to be shown; before them, what a stop string may begin in.
        self._before = b"".join(map(self._tokens, prompt))[-self._reach :] if self._reach else b""
        self._held = bytearray()
        self._shown = bytearray()

    def push(self, ids: Iterable[int]) -> str:
        """Take more ids and return the text that is certain now."""
        return "".join(map(self._push_one, ids))

    def finish(self) -> str:
        """The text that was held back. Bytes that never became a character are U+FFFD."""
        return self._clean(self._release(len(self._held)) + self._utf8.decode(b"", final=True), last=True)

    def _push_one(self, token_id: int) -> str:
        if self.stopped:
            return ""
        new = self._tokens(token_id)
        self._held += new
        self._shown += bytes([token_id not in self._skipped]) * len(new)
        text = self._before + self._held
        # What lies in front altogether was there before: it ends nothing.
        found = (text.find(stop, max(len(self._before) - len(stop) + 1, 0)) for stop in self._stops)
        starts = [start for start in found if start >= 0]
        if starts:
            self.stopped = True
            kept = max(min(starts) - len(self._before), 0)
            del self._held[kept:], self._shown[kept:]
            return self._clean(self._release(kept))
        return self._clean(self._release(len(self._held) - self._possible_start(text)))

    def _possible_start(self, text: bytes) -> int:
        """How many of the last bytes may turn out to be the beginning of a stop string."""
        lengths = range(min(self._reach, len(text)), 0, -1)
        starts = (text[len(text) - length :] for length in lengths)
        start = next((start for start in starts if any(stop.startswith(start) for stop in self._stops)), b"")
        return min(len(start), len(self._held))

    def _release(self, count: int) -> str:
        visible = bytes(byte for byte, shown in zip(self._held[:count], self._shown[:count], strict=True) if shown)
        self._before = (self._before + self._held[:count])[-self._reach :] if self._reach else b""
        del self._held[:count], self._shown[:count]
        return self._utf8.decode(visible)

    def _clean(self, text: str, *, last: bool = False) -> str:
        if not self._cleans:
            return text
        self._unclean += text
        # What is cleaned up never goes on behind two letters, so that the text can be cut there.
        cuts = range(len(self._unclean), 1, -1)
        cut = next((cut for cut in cuts if self._unclean[cut - 2 : cut].isalpha()), 0)
        cut = len(self._unclean) if last else cut
        done, self._unclean = self._unclean[:cut], self._unclean[cut:]
        return clean_up(done)


def new_text(tokenizer: OPTTokenizer, prompt: Iterable[int], settings: GenerationConfig) -> TextDecoder:
    """What makes text of the tokens that follow a prompt: without special tokens, up to the first stop string."""
    return TextDecoder(tokenizer, skip_special_tokens=True, stop_strings=settings.stop_strings, prompt=prompt)


def text_pieces(
    steps: Iterator[Mapping[str, npt.NDArray[Any]]],
    around: Callable[[], contextlib.AbstractContextManager[Any]],
    decoder: TextDecoder,
) -> Iterator[str]:
    """What the steps of one row say, as soon as it is certain.

    Args:
        steps: with "tokens", (1,) each.
        around: makes the context that each step is computed in, and nothing else is.
        decoder: makes text of tokens.
    """
    while True:
        with around():
            found = next(steps, None)
        if found is None:
            break
        if piece := decoder.push(found["tokens"].tolist()):
            yield piece
    if piece := decoder.finish():
        yield piece


def new_texts(
    tokenizer: OPTTokenizer,
    prompt_ids: npt.NDArray[np.integer[Any]],
    new_ids: npt.NDArray[np.integer[Any]],
    settings: GenerationConfig,
) -> list[str]:
    """The new text of each row.

    Args:
        tokenizer: whose ids they are.
        prompt_ids: (B, T).
        new_ids: (R, new): as many rows of each prompt, one after the other.
        settings: what they were generated with.
    """
    copies = len(new_ids) // len(prompt_ids)
    texts: list[str] = []
    for number, row in enumerate(new_ids):
        decoder = new_text(tokenizer, prompt_ids[number // copies].tolist(), settings)
        texts.append(decoder.push(row.tolist()) + decoder.finish())
    return texts


class TokenBytes:
    """The bytes that a token stands for, by its id; none for an id that no token has.

    Raises:
        TokenizerError: for a tokenizer whose tokens are not bytes.
    """

    def __init__(self, tokenizer: OPTTokenizer) -> None:
        if type(tokenizer.engine.decoder).__name__ != "ByteLevel":
            raise TokenizerError(
                "This tokenizer's tokens are not bytes: its decoder is not ByteLevel. Streaming and stop_strings need "
                "byte-level BPE, which OPT has."
            )
        self._engine = tokenizer.engine
        self._found: dict[int, bytes] = {}

    def __call__(self, token_id: int) -> bytes:
        if token_id not in self._found:
            token = self._engine.id_to_token(token_id) or ""
            table = byte_by_letter()
            known = all(letter in table for letter in token)
            self._found[token_id] = bytes(map(table.__getitem__, token)) if known else token.encode()
        return self._found[token_id]


@functools.cache
def byte_by_letter() -> dict[str, int]:
    """Which byte each letter of a byte-level vocabulary stands for (GPT-2's rule).

    Printable bytes of Latin-1 stand for themselves; the others, in order, have the letters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    letters = [*map(chr, printable), *(chr(0x100 + number) for number in range(len(others)))]
    return dict(zip(letters, [*printable, *others], strict=True))


class Streamer(Protocol):
    """What `generate(streamer=…)` takes, as in Hugging Face."""

    def put(self, value: npt.NDArray[np.integer[Any]]) -> Any:
        """Take the prompts' ids, (B, T), in the first call, and the next token of each row, (B,), in all others."""
        ...

    def end(self) -> Any:
        """Take notice that the text is complete."""
        ...


class TextStreamer:
    """Prints a text as it is produced.

    Args:
        tokenizer: the tokenizer of the model.
        skip_prompt: print the new text alone.
        skip_special_tokens: as in `OPTTokenizer.decode`.
        clean_up_tokenization_spaces: likewise.
    """

    def __init__(
        self,
        tokenizer: OPTTokenizer,
        skip_prompt: bool = False,
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.skip_special_tokens = skip_special_tokens
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self._decoder: TextDecoder | None = None

    def put(self, value: Any) -> None:
        """Take ids; see `Streamer`.

        Raises:
            GenerationError: for more than one row.
        """
        ids = np.asarray(value)
        if len(ids) != 1:
            raise GenerationError(
                f"A {type(self).__name__} takes one text, got {len(ids)}. Stream one prompt at a time."
            )
        is_prompt = self._decoder is None
        self._decoder = self._decoder or TextDecoder(
            self.tokenizer,
            skip_special_tokens=self.skip_special_tokens,
            clean_up_tokenization_spaces=self.clean_up_tokenization_spaces,
        )
        if not (is_prompt and self.skip_prompt):
            self.on_finalized_text(self._decoder.push(ids.reshape(-1).tolist()))

    def end(self) -> None:
        """Print what was held back, and a line break."""
        decoder, self._decoder = self._decoder, None
        self.on_finalized_text("" if decoder is None else decoder.finish(), stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Do something with the next piece of text; a subclass may do anything else with it."""
        sys.stdout.write(text + "\n" * stream_end)
        sys.stdout.flush()


class TextIteratorStreamer(TextStreamer):
    """Hands a text over to another thread, which iterates over its pieces. `model.stream` does without a thread.

    Args:
        tokenizer: the tokenizer of the model.
        skip_prompt: hand over the new text alone.
        timeout: how many seconds to wait for a piece; `queue.Empty` is raised then. None waits for ever.
        skip_special_tokens: as in `OPTTokenizer.decode`.
        clean_up_tokenization_spaces: likewise.
    """

    def __init__(
        self,
        tokenizer: OPTTokenizer,
        skip_prompt: bool = False,
        timeout: float | None = None,
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> None:
        super().__init__(
            tokenizer,
            skip_prompt,
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
        )
        self.timeout = timeout
        self.text_queue: queue.Queue[str | None] = queue.Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Put a piece into the queue, and None behind the last one."""
        self.text_queue.put(text)
        if stream_end:
            self.text_queue.put(None)

    def __iter__(self) -> Iterator[str]:
        while (text := self.text_queue.get(timeout=self.timeout)) is not None:
            yield text
