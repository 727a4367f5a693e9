"""`OPTTokenizer`: OPT's byte-level BPE, on the `tokenizers` library.

There is one tokenizer. On single texts its ids are those of both of Hugging Face's GPT-2 tokenizers, slow and fast,
set up as OPT's files say: `</s>` (id 2) in front of every text, nothing at its end, `<pad>` (id 1) as padding. Where
the two disagree it follows the slow one on pairs of texts (`</s> A </s> B`) and the fast one on ids that no token has.

The library cuts text into tokens and puts it together again; prefix, truncation, padding and tensors are done here, in
plain Python, so that a tokenizer has no hidden state.
"""

import json
import operator
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from opt_common.encoding import (
    PADDING,
    SIDES,
    TRUNCATION,
    BatchEncoding,
    Layout,
    Row,
    as_ids,
    as_texts,
    option,
    rectangular,
    tensor_maker,
    truncated,
)
from opt_common.errors import TokenizerError
from opt_common.hub import resolve
from opt_common.tokenizer_files import VERY_LONG, add_token, read_settings, template

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Side = Literal["left", "right"]
AddBos = bool | Literal["once"]


# What `clean_up_tokenization_spaces` undoes, in Hugging Face's order: later rows see what earlier ones left.
_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def clean_up(text: str) -> str:
    """A text without the spaces in front of punctuation."""
    for old, new in _CLEAN_UP:
        text = text.replace(old, new)
    return text


class _SpecialToken:
    """A special token of a tokenizer: its text, or None. Only a token that the vocabulary has can be set."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: "OPTTokenizer", owner: type | None = None) -> str | None:
        return instance.special_tokens_map.get(self.name)

    def __set__(self, instance: "OPTTokenizer", token: str | None) -> None:
        instance.set_special_token(self.name, token)


class _SpecialTokenId:
    """The id of a special token of a tokenizer, or None."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name.removesuffix("_id")

    def __get__(self, instance: "OPTTokenizer", owner: type | None = None) -> int | None:
        token = instance.special_tokens_map.get(self.name)
        return None if token is None else instance.engine.token_to_id(token)


class OPTTokenizer:
    """Text to ids and back. `from_pretrained` makes one; attributes may be set afterwards, as with Hugging Face's.

    Args:
        engine: the `tokenizers.Tokenizer` that cuts text. It becomes this one's own: its truncation and padding are
            switched off.
        bos_token: token in front of every text, or None.
        eos_token: token that ends a generated text, or None.
        unk_token: token that `convert_tokens_to_ids` gives for what is no token, or None.
        pad_token: token that fills short rows, or None.
        additional_special_tokens: more tokens that `skip_special_tokens` skips.
        add_bos_token: True puts `bos_token` in front of every text, also of one that begins with it (as Hugging Face
            does; a warning says so); "once" only where it isn't there; False never.
        padding_side: "right", or "left" for generation.
        truncation_side: the side where a text that is too long loses tokens.
        model_max_length: tokens that the model can take, prefix included.
        clean_up_tokenization_spaces: what `decode` does when it is not told.
        name_or_path: where the tokenizer came from.
        extra: keys of the `tokenizer_config.json` that mean nothing here; written back by `save_pretrained`.

    Attributes:
        bos_token, eos_token, unk_token, pad_token: text of a special token; only a token of the vocabulary can be set.
        bos_token_id, eos_token_id, unk_token_id, pad_token_id: their ids, None where there is no such token.
        model_input_names: entries of an encoding that a model takes.

    Raises:
        TokenizerError: for a special token that the vocabulary lacks, or settings that contradict each other.
    """

    model_input_names = ("input_ids", "attention_mask")

    bos_token = _SpecialToken()
    eos_token = _SpecialToken()
    unk_token = _SpecialToken()
    pad_token = _SpecialToken()
    bos_token_id = _SpecialTokenId()
    eos_token_id = _SpecialTokenId()
    unk_token_id = _SpecialTokenId()
    pad_token_id = _SpecialTokenId()

    def __init__(
        self,
        engine: "Tokenizer",
        *,
        bos_token: str | None = "</s>",
        eos_token: str | None = "</s>",
        unk_token: str | None = "</s>",
        pad_token: str | None = "<pad>",
        additional_special_tokens: Sequence[str] = (),
        add_bos_token: AddBos = True,
        padding_side: Side = "right",
        truncation_side: Side = "right",
        model_max_length: int = VERY_LONG,
        clean_up_tokenization_spaces: bool = False,
        name_or_path: str = "",
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.engine = engine
        engine.no_truncation()
        engine.no_padding()
        self.special_tokens_map: dict[str, str] = {}
        tokens = {"bos_token": bos_token, "eos_token": eos_token, "unk_token": unk_token, "pad_token": pad_token}
        for name, token in tokens.items():
            self.set_special_token(name, token)
        self.additional_special_tokens = tuple(additional_special_tokens)
        for token in self.additional_special_tokens:
            self._make_special("additional_special_tokens", token)
        self.add_bos_token = add_bos_token
        self.padding_side = padding_side
        self.truncation_side = truncation_side
        self.model_max_length = model_max_length
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.name_or_path = name_or_path
        self._extra = dict(extra or {})
        prefix, self._suffix = template(engine)
        # A template that puts the bos token there says the same as `add_bos_token`, which is the one that counts.
        self._prefix = () if prefix == (self.bos_token_id,) else prefix
        self._affixes()

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        padding_side: Side | None = None,
        truncation_side: Side | None = None,
        add_bos_token: AddBos | None = None,
        model_max_length: int | None = None,
        use_fast: bool | None = None,
    ) -> Self:
        """The tokenizer of a model: a directory, "opt-tiny", or a hub id.

        Reads `tokenizer.json`, or else `vocab.json` and `merges.txt`. Special tokens are those that
        `tokenizer_config.json` names, else `special_tokens_map.json`, else those whose ids `config.json` names, else,
        for `vocab.json` and `merges.txt`, OPT's own. The prefix is what `tokenizer_config.json` says
        (`add_bos_token`), else what the template in `tokenizer.json` does; `vocab.json` and `merges.txt` mean a prefix.
        The longest text is what `tokenizer_config.json` says, else the `max_position_embeddings` of `config.json`.

        Args:
            path_or_id: see `opt_common.hub.resolve`, as for the next four.
            revision: branch, tag or commit of the hub's repository.
            cache_dir: directory of the hub's cache.
            token: the hub's access token.
            local_files_only: use the cache only.
            padding_side: overrides the files, as do the next three.
            truncation_side: see the class.
            add_bos_token: see the class.
            model_max_length: see the class.
            use_fast: for scripts written for Hugging Face. True and False both mean this tokenizer.

        Raises:
            CheckpointError: if there is no such directory or repository.
            TokenizerError: if it holds no tokenizer, or a damaged one.
        """
        directory = resolve(
            path_or_id,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            weights=False,
        )
        settings = read_settings(directory)
        chosen = {
            "padding_side": padding_side,
            "truncation_side": truncation_side,
            "add_bos_token": add_bos_token,
            "model_max_length": model_max_length,
        }
        settings |= {name: value for name, value in chosen.items() if value is not None}
        return cls(**settings, name_or_path=os.fspath(path_or_id))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.name_or_path!r}, {len(self)} tokens, {self.special_tokens_map}, "
            f"add_bos_token={self.add_bos_token!r}, padding_side={self.padding_side!r})"
        )

    # The vocabulary

    @property
    def vocab_size(self) -> int:
        """Number of tokens, without those that were added to the vocabulary later."""
        return self.engine.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        """Number of tokens, with added ones. OPT's own models have 7 rows more than that in their tables."""
        return self.engine.get_vocab_size(with_added_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        """Id by token, with added tokens."""
        return self.engine.get_vocab(with_added_tokens=True)

    @property
    def all_special_tokens(self) -> list[str]:
        """Every special token, once."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self.additional_special_tokens]))

    @property
    def all_special_ids(self) -> list[int]:
        """Id of every special token, once."""
        return [self._id(token) for token in self.all_special_tokens]

    def set_special_token(self, name: str, token: str | None) -> None:
        """Make a token of the vocabulary the `name` ("pad_token", …), or have none.

        Raises:
            TokenizerError: if the vocabulary has no such token.
        """
        if token is None:
            self.special_tokens_map.pop(name, None)
            return
        self._make_special(name, token)
        self.special_tokens_map[name] = token

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """The id of a token, or a list of ids. What is no token becomes `unk_token_id`, which OPT has at `</s>`."""
        if isinstance(tokens, str):
            found = self.engine.token_to_id(tokens)
            return self.unk_token_id if found is None else found
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, *, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or a list of tokens; None for an id that no token has.

        Args:
            ids: an int, or ints in a list or an array (T,) of any framework.
            skip_special_tokens: leave special tokens out of a list.
        """
        found = as_ids(ids)
        tokens = [self.engine.id_to_token(token_id) for token_id in found.ids]
        if found.is_one:
            return tokens[0]
        special = self.skipped_ids() if skip_special_tokens else frozenset[int]()
        return [token for token, token_id in zip(tokens, found.ids, strict=True) if token_id not in special]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text that tokens stand for."""
        decoder: Any = self.engine.decoder
        return "".join(tokens) if decoder is None else decoder.decode(list(tokens))

    # Text to ids

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: Side | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool = True,
        return_special_tokens_mask: bool = False,
    ) -> BatchEncoding:
        """Encode a text, or a list of texts.

        Args:
            text: a text or a list of B texts.
            text_pair: what follows each text, with a prefix of its own: `</s> A </s> B`, as in Hugging Face's slow
                tokenizer (its fast one has no second `</s>`).
            add_special_tokens: whether the prefix is put in front; False means the bare text.
            padding: True or "longest" fills rows up to the longest one, "max_length" up to `max_length`.
            truncation: True or "longest_first" cuts what is longer than `max_length`, of a pair the longer text first;
                "only_first" and "only_second" cut one text of a pair. The prefix is never cut.
            max_length: tokens in a row, prefix included; default `model_max_length`.
            pad_to_multiple_of: pad to a multiple of that.
            padding_side: "left" or "right"; default the tokenizer's.
            return_tensors: "np" (int64), "pt" (torch, int64), "tf" (int32) or "jax" (int32): arrays (B, T), with B = 1
                for a single text. None: lists.
            return_attention_mask: whether there is an `attention_mask`.
            return_special_tokens_mask: whether there is a `special_tokens_mask`.

        Raises:
            TokenizerError: for arguments that can't be used, and for rows of unequal lengths where an array is wanted.
            MissingFrameworkError: if the framework of `return_tensors` is not installed.
        """
        texts, is_one = as_texts(text, "text")
        pairs = None if text_pair is None else as_texts(text_pair, "text_pair")[0]
        if pairs is not None and (len(pairs) != len(texts) or isinstance(text_pair, str) != is_one):
            raise TokenizerError(
                "text_pair must be a text for a text, or a list of as many texts as there are in text."
            )
        layout = self._layout(padding, truncation, max_length, pad_to_multiple_of, padding_side)
        rows = self._rows(texts, pairs, layout, add_special_tokens=add_special_tokens)
        columns = self._columns(rows, layout)
        if not return_attention_mask:
            del columns["attention_mask"]
        if not return_special_tokens_mask:
            del columns["special_tokens_mask"]
        if return_tensors is not None:
            convert = tensor_maker(return_tensors)
            return BatchEncoding({name: convert(rectangular(column)) for name, column in columns.items()})
        return BatchEncoding({name: column[0] if is_one else column for name, column in columns.items()})

    def encode(
        self,
        text: str,
        text_pair: str | None = None,
        *,
        add_special_tokens: bool = True,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
    ) -> Any:
        """The ids of one text: a list, or with `return_tensors` an array (1, T). Arguments as in a call."""
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # users don't run a type checker
            raise TokenizerError(
                f"encode: text is a {type(text).__name__}, expected one text. Call the tokenizer itself."
            )
        encoding = self(
            text,
            text_pair,
            add_special_tokens=add_special_tokens,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
        )
        return encoding["input_ids"]

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text, without prefix, as the vocabulary spells them ("Ġ" is a space)."""
        return [cast("str", self.engine.id_to_token(token_id)) for token_id in self._cut(as_texts(text, "text")[0])[0]]

    # Ids to text

    def decode(
        self,
        token_ids: Any,
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        """The text of a row of ids.

        Bytes that are no UTF-8 become U+FFFD. Ids that no token has are skipped, as by Hugging Face's fast tokenizer:
        OPT's tables have 7 such rows, which a model may choose.

        Args:
            token_ids: an int, or ints in a list or an array (T,) of any framework.
            skip_special_tokens: leave special tokens out.
            clean_up_tokenization_spaces: drop spaces in front of punctuation; default the tokenizer's, which is False.

        Raises:
            TokenizerError: for what is no row of ids.
        """
        text = self.engine.decode(as_ids(token_ids).ids, skip_special_tokens=skip_special_tokens)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return clean_up(text) if clean_up_tokenization_spaces else text

    def batch_decode(
        self,
        sequences: Iterable[Any],
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """The text of each row of a list, or of an array (B, T) of any framework. Arguments as in `decode`."""
        return [
            self.decode(
                row,
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            )
            for row in sequences
        ]

    # Files

    def save_pretrained(self, directory: str | os.PathLike[str]) -> tuple[Path, ...]:
        """Write files that this class and both of Hugging Face's GPT-2 tokenizers read back; return their paths.

        Raises:
            TokenizerError: if the directory can't be written.
        """
        directory = Path(directory)
        files = self._files()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (directory / name).write_text(text, encoding="utf-8", newline="\n")
        except OSError as error:
            raise TokenizerError(f"{directory} can't be written: {error.strerror}. Name another directory.") from None
        return tuple(directory / name for name in files)

    def _files(self) -> dict[str, str]:
        """Contents by name of the files that `save_pretrained` writes."""
        from tokenizers import Tokenizer

        engine: Any = Tokenizer.from_str(self.engine.to_str())
        engine.post_processor = self._post_processor()
        state = json.loads(engine.to_str())
        vocabulary = sorted(state["model"]["vocab"].items(), key=operator.itemgetter(1))
        merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"])
        config = {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": False,
            "errors": "replace",
            **self._extra,
            **self._special_entries(),
            "add_bos_token": bool(self.add_bos_token),
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
            "added_tokens_decoder": {
                str(entry.pop("id")): entry for entry in json.loads(self.engine.to_str())["added_tokens"]
            },
        }
        return {
            "vocab.json": json.dumps(dict(vocabulary), ensure_ascii=False),
            "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
            "tokenizer.json": engine.to_str(),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n",
            "special_tokens_map.json": json.dumps(self._special_entries(), indent=2, ensure_ascii=False) + "\n",
        }

    def _special_entries(self) -> dict[str, Any]:
        entries: dict[str, Any] = dict(self.special_tokens_map)
        if self.additional_special_tokens:
            entries["additional_special_tokens"] = list(self.additional_special_tokens)
        return entries

    def _post_processor(self) -> Any:
        """What puts prefix and suffix in for those who read `tokenizer.json` alone."""
        from tokenizers import processors

        prefix, suffix = self._affixes()
        if not prefix and not suffix:
            return processors.ByteLevel(trim_offsets=False)
        tokens = {token_id: cast("str", self.engine.id_to_token(token_id)) for token_id in (*prefix, *suffix)}

        def around(letter: str, kind: int) -> list[str]:
            before, after = ([f"{tokens[token_id]}:{kind}" for token_id in ids] for ids in (prefix, suffix))
            return [*before, f"${letter}:{kind}", *after]

        return processors.TemplateProcessing(
            single=around("A", 0),
            pair=[*around("A", 0), *around("B", 1)],
            special_tokens=[(token, token_id) for token_id, token in tokens.items()],
        )

    # Steps of an encoding

    def _id(self, token: str) -> int:
        return cast("int", self.engine.token_to_id(token))

    def _make_special(self, name: str, token: str) -> None:
        """Have the engine treat a token of the vocabulary as one that `skip_special_tokens` skips."""
        from tokenizers import AddedToken

        token_id = self.engine.token_to_id(token)
        if token_id is None:
            raise TokenizerError(f"{name} is {token!r}, which is no token of this vocabulary. Choose one that is.")
        if token_id not in self.skipped_ids():
            add_token(self.engine, AddedToken(token, special=True))

    def skipped_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` skips."""
        added = self.engine.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def _affixes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids in front of and behind every text."""
        if self.add_bos_token not in (True, False, "once"):
            raise TokenizerError(f"add_bos_token is {self.add_bos_token!r}, expected True, False or 'once'.")
        if not self.add_bos_token:
            return self._prefix, self._suffix
        if self.bos_token_id is None:
            raise TokenizerError(
                "add_bos_token is set, but this tokenizer has no bos_token. Set one, or add_bos_token=False."
            )
        return (self.bos_token_id,), self._suffix

    def _layout(
        self,
        padding: bool | str,
        truncation: bool | str | None,
        max_length: int | None,
        multiple: int | None,
        padding_side: str | None,
    ) -> Layout:
        """Check the arguments that decide how long rows become."""
        pad = option("padding", padding, PADDING)
        cut = option("truncation", truncation, TRUNCATION)
        side = self.padding_side if padding_side is None else padding_side
        for name, value in (("padding_side", side), ("truncation_side", self.truncation_side)):
            if value not in SIDES:
                raise TokenizerError(f"{name} is {value!r}, expected 'left' or 'right'.")
        for name, value in (("max_length", max_length), ("pad_to_multiple_of", multiple)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TokenizerError(f"{name} is {value!r}, expected a positive integer or None.")
        if pad is not None and self.pad_token_id is None:
            raise TokenizerError("padding needs a pad_token, and this tokenizer has none. Set tokenizer.pad_token.")
        if max_length is not None and truncation is None and pad is None:
            warnings.warn("max_length without truncation: texts are truncated. Say truncation=True.", stacklevel=3)
            cut = "longest_first"
        elif max_length is not None and cut is None and pad != "max_length":
            warnings.warn("max_length has no effect: it needs truncation=True or padding='max_length'.", stacklevel=3)
        if max_length is None and (cut is not None or pad == "max_length"):
            if self.model_max_length >= VERY_LONG:
                raise TokenizerError("This tokenizer has no model_max_length, so that you have to give a max_length.")
            max_length = self.model_max_length
        return Layout(
            truncation=cut,
            padding=pad,
            max_length=max_length,
            multiple=multiple or 1,
            padding_side=side,
            truncation_side=self.truncation_side,
        )

    def _cut(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, nothing put in."""
        try:
            if len(texts) == 1:  # without the library's threads, which complain when a process forks later
                return [self.engine.encode(texts[0], add_special_tokens=False).ids]
            return [encoding.ids for encoding in self.engine.encode_batch_fast(list(texts), add_special_tokens=False)]
        except (TypeError, UnicodeEncodeError):
            bad = [index for index, text in enumerate(texts) if any("\ud800" <= letter <= "\udfff" for letter in text)]
            raise TokenizerError(
                f"Text {bad[0] if bad else 0} of {len(texts)} holds half of a surrogate pair, which is no character. "
                f"Decode its bytes with errors='replace'."
            ) from None

    def _rows(
        self, texts: Sequence[str], pairs: Sequence[str] | None, layout: Layout, *, add_special_tokens: bool
    ) -> list[Row]:
        """The row of each text or pair: cut, truncated, prefix in front; not yet padded."""
        parts = [self._cut(texts)] if pairs is None else [self._cut(texts), self._cut(pairs)]
        prefix, suffix = self._affixes() if add_special_tokens else ((), ())
        is_bos = bool(self.add_bos_token) and bool(prefix)
        doubled = is_bos and any(ids[:1] == list(prefix) for column in parts for ids in column)
        if doubled and self.add_bos_token != "once":
            warnings.warn(
                f"A text begins with {self.bos_token!r}, and another one is put in front of it. Take it off, pass "
                f"add_special_tokens=False, or set tokenizer.add_bos_token = 'once'.",
                stacklevel=3,
            )
        elif doubled:
            parts = [[ids[1:] if ids[:1] == list(prefix) else ids for ids in column] for column in parts]
        rows: list[Row] = []
        for row in zip(*parts, strict=True):
            if layout.truncation is not None:
                row = truncated(row, len(row) * (len(prefix) + len(suffix)), layout)  # noqa: PLW2901  # the same row
            ids = [token_id for part in row for token_id in (*prefix, *part, *suffix)]
            special = [flag for part in row for flag in (*[1] * len(prefix), *[0] * len(part), *[1] * len(suffix))]
            rows.append(Row(ids, special))
        return rows

    def _columns(self, rows: Sequence[Row], layout: Layout) -> dict[str, list[list[int]]]:
        """All entries of an encoding, padded."""
        longest = max((len(row.ids) for row in rows), default=0)
        width = 0
        if layout.padding is not None:
            width = longest if layout.padding == "longest" else cast("int", layout.max_length)
            width = -(-width // layout.multiple) * layout.multiple

        def padded(values: list[int], filler: int) -> list[int]:
            fill = [filler] * (width - len(values))
            return [*fill, *values] if layout.padding_side == "left" else [*values, *fill]

        # Where nothing is padded there may be no pad token, and nothing to fill in.
        pad = self.pad_token_id or 0
        return {
            "input_ids": [padded(row.ids, pad) for row in rows],
            "attention_mask": [padded([1] * len(row.ids), 0) for row in rows],
            "special_tokens_mask": [padded(row.special, 1) for row in rows],
        }
