"""Continuing texts for a command line: whole, as they grow, or in turns with a person."""

import contextlib
import dataclasses
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from opt_common.encoding import tensor_maker
from opt_common.errors import GenerationError, OPTError
from opt_common.generation_config import GenerationConfig
from opt_common.streaming import TextDecoder, new_text
from opt_common.tokenizer import OPTTokenizer

INTERACTIVE = """\
Each line is added to the text, which the model then goes on with. An empty line goes on as it is, /reset begins anew.
Ctrl-C ends an answer, Ctrl-D (or Ctrl-C at the prompt) the program."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One text: a prompt, and what continues it. `complete` is False for what an interruption left."""

    prompt: str
    continuation: str
    complete: bool = True


class Collector:
    """A streamer that keeps what it is given, and calls a function with each new token of the first row."""

    def __init__(self, show: Callable[[int], None] | None = None) -> None:
        self.steps: list[npt.NDArray[np.integer[Any]]] = []
        self.show = show

    def put(self, value: npt.NDArray[np.integer[Any]]) -> None:
        """Take prompts or tokens; see `opt_common.streaming.Streamer`."""
        self.steps.append(value)
        if self.show is not None and len(self.steps) > 1:
            self.show(int(value[0]))

    def end(self) -> None:
        """Nothing is left to do."""

    def new_ids(self) -> list[list[int]]:
        """The tokens of each row so far."""
        return [list(map(int, row)) for row in zip(*self.steps[1:], strict=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writer:
    """Continues texts with one model and prints them.

    Attributes:
        model: the language model of any framework.
        tokenizer: its tokenizer, padding on the left.
        tensors: what the tokenizer calls the framework's arrays.
        settings: keywords of `generate`.
        negative_prompt: what to guide away from, or None.
    """

    model: Any
    tokenizer: OPTTokenizer
    tensors: str
    settings: dict[str, Any]
    negative_prompt: str | None = None

    def options(self) -> GenerationConfig:
        """The settings in force."""
        return self.model.generation_config.updated(**self.settings)

    def can_stream(self) -> bool:
        """Whether there is one text at a time, which grows at its end."""
        return self.options().streams and self.options().num_return_sequences == 1

    def decoder(self, prompt_ids: Sequence[int]) -> TextDecoder:
        """What makes text of new tokens."""
        return new_text(self.tokenizer, prompt_ids, self.options())

    def generate(self, ids: Any, mask: Any, collector: Collector, **more: Any) -> Any:
        """Run the model; the collector gets the tokens where the strategy goes token by token."""
        watched = {"streamer": collector} if self.options().streams else {}
        if self.negative_prompt is not None:
            negative = self.tokenizer([self.negative_prompt], return_tensors=self.tensors)
            more = {**more, "negative_prompt_ids": negative["input_ids"]}
        return self.model.generate(
            ids, attention_mask=mask, tokenizer=self.tokenizer, **self.settings, **watched, **more
        )

    def texts(self, prompts: Sequence[str], *, rows: int) -> Iterator[Line]:
        """Continue a batch.

        Args:
            prompts: the texts.
            rows: how many texts a batch has; a smaller one is filled up, so that no compiler sees another shape.

        Raises:
            KeyboardInterrupt: after what was there has been yielded.
        """
        batch = [*prompts, *[prompts[-1]] * (rows - len(prompts))]
        inputs = self.tokenizer(batch, padding=True, return_tensors=self.tensors)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        collector = Collector()
        interrupt = None
        try:
            new_ids = np.asarray(self.generate(ids, mask, collector))[:, ids.shape[1] :].tolist()
        except KeyboardInterrupt as stopped:
            interrupt, new_ids = stopped, collector.new_ids()
        copies = len(new_ids) // len(batch)
        for number, row in enumerate(new_ids[: copies * len(prompts)]):
            decoder = self.decoder(np.asarray(ids)[number // copies].tolist())
            continuation = decoder.push(row) + decoder.finish()
            yield Line(prompt=prompts[number // copies], continuation=continuation, complete=interrupt is None)
        if interrupt is not None:
            raise interrupt

    def stream(self, prompt: str) -> None:
        """Print one text as it is produced."""
        inputs = self.tokenizer([prompt], return_tensors=self.tensors)
        decoder = self.decoder(np.asarray(inputs["input_ids"])[0].tolist())
        _show(prompt)
        try:
            self.generate(
                inputs["input_ids"], inputs["attention_mask"], Collector(lambda token: _show(decoder.push([token])))
            )
        finally:
            _show(decoder.finish() + "\n")

    def converse(self, prompts: Sequence[str]) -> None:
        """Let a person add to the text, line by line, and show how the model goes on. Only new text is read."""
        if not self.can_stream():
            raise GenerationError("--interactive shows one text as it grows: leave out beams and num_return_sequences.")
        if sys.stdin.isatty():
            print(INTERACTIVE, file=sys.stderr)
        conversation = Conversation(self)
        for line in itertools.chain(prompts, _lines()):
            if line == "/reset":
                conversation = Conversation(self)
                continue
            try:
                conversation.add(line)
            except KeyboardInterrupt:
                continue
            except OPTError as error:
                print(f"{error} /reset begins a new text.", file=sys.stderr)


class Conversation:
    """A text that a person and the model write in turn, with the cache of what the model has read of it."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.ids: list[int] = []
        self.read: list[int] = []
        self.cache: Any = None

    def add(self, line: str) -> None:
        """Add a line to the text, and print how it goes on.

        Raises:
            KeyboardInterrupt: after the text so far has been kept.
        """
        tokenizer = self.writer.tokenizer
        if line or not self.ids:
            line = "\n" * bool(self.ids) + line
            self.ids += tokenizer(line, add_special_tokens=not self.ids)["input_ids"]
        decoder = self.writer.decoder(self.ids)
        pieces: list[str] = []

        def show(token: int) -> None:
            pieces.append(decoder.push([token]))
            _show(pieces[-1])

        collector = Collector(show)
        try:
            output = self.writer.generate(
                self._array(self.ids),
                None,
                collector,
                past_key_values=self._past(),
                return_dict_in_generate=True,
            )
            self.cache = output.past_key_values
            self.read = np.asarray(output.sequences)[0].tolist()
        finally:
            pieces.append(decoder.finish())
            _show(pieces[-1] + "\n")
            new_ids = [row for rows in collector.new_ids()[:1] for row in rows]
            # Behind a stop string nothing was shown, so that nothing of it belongs to the text either.
            self.ids += (
                tokenizer("".join(pieces), add_special_tokens=False)["input_ids"] if decoder.stopped else new_ids
            )

    def _past(self) -> Any:
        """The cache, as far as it is of this text; the model must have at least one token left to read."""
        if self.cache is None:
            return None
        pairs = zip(self.read[: int(self.cache.length)], self.ids[:-1], strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        return dataclasses.replace(self.cache, length=same) if same else None

    def _array(self, ids: list[int]) -> Any:
        return tensor_maker(self.writer.tensors)(np.array([ids]))


def _lines() -> Iterator[str]:
    """What a person types; the end of input ends it."""
    asks = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    if asks:
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # gives input() its line editing
    while True:
        try:
            yield input(asks)
        except EOFError:
            if asks:
                print()
            return


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
