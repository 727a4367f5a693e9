"""Reading a tokenizer's files: `tokenizer.json`, or `vocab.json` and `merges.txt`, and what stands beside them.

Everything here is untrusted input; what can't be used is named in a `TokenizerError`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from opt_common.encoding import SIDES
from opt_common.errors import TokenizerError
from opt_common.hub import CONFIG_FILE
from opt_common.json_file import UnreadableError, read_json

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

VERY_LONG = int(1e30)
"""`model_max_length` of a tokenizer whose files name no limit; Hugging Face's value."""

_MAX_BYTES = 50_000_000  # OPT's own vocabulary takes a fiftieth of this

_DEFAULT_SPECIAL_TOKENS = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
_OTHER_SPECIAL_TOKENS = ("sep_token", "cls_token", "mask_token")


def read_settings(directory: Path) -> dict[str, Any]:
    """Arguments of `OPTTokenizer` out of the files of a directory."""
    config = _read_object(directory / "tokenizer_config.json")
    special_map = _read_object(directory / "special_tokens_map.json")
    model_config = _read_object(directory / CONFIG_FILE)
    if config.get("errors", "replace") != "replace":
        raise TokenizerError(f"{directory}: tokenizer_config.json has errors {config['errors']!r}, expected 'replace'.")
    is_plain = not (directory / "tokenizer.json").is_file()
    if is_plain:
        engine = _read_vocabulary(directory, add_prefix_space=config.get("add_prefix_space") is True)
    else:
        engine = _read_tokenizer_json(directory / "tokenizer.json")
    _add_tokens(directory, engine, config)
    settings = _special_settings(engine, [config, special_map], model_config, defaults=is_plain)
    bos_id = engine.token_to_id(settings["bos_token"] or "")
    settings["add_bos_token"] = is_plain or (bos_id is not None and template(engine)[0] == (bos_id,))
    limit = model_config.get("max_position_embeddings")
    if isinstance(limit, int) and limit > 0:
        settings["model_max_length"] = limit
    for name in _SETTINGS:
        value = config.pop(name, None)
        if value is not None:
            settings[name] = _setting(directory, name, value)
    return {"engine": engine, **settings, "extra": config}


def _special_settings(
    engine: "Tokenizer", sources: Sequence[dict[str, Any]], model_config: Mapping[str, Any], *, defaults: bool
) -> dict[str, Any]:
    """Special tokens: of the first source that names one, else by id, else OPT's own. Takes them out of the sources."""

    def named(name: str) -> Any:
        values = [source.pop(name, None) for source in sources]
        return next((value for value in values if value), None)

    settings: dict[str, Any] = {}
    for name, default in _DEFAULT_SPECIAL_TOKENS.items():
        value, token_id = named(name), model_config.get(name + "_id")
        if value is None and isinstance(token_id, int) and 0 <= token_id < 2**32:
            value = engine.id_to_token(token_id)
        if value is None and defaults and engine.token_to_id(default) is not None:
            value = default
        settings[name] = None if value is None else _add_special(engine, name, value)
    more: Any = named("additional_special_tokens") or []
    if not isinstance(more, list):
        raise TokenizerError(f"additional_special_tokens is {more!r}, expected a list.")
    others = [value for value in map(named, _OTHER_SPECIAL_TOKENS) if value]
    values = [*others, *cast("list[Any]", more)]
    settings["additional_special_tokens"] = [_add_special(engine, "a special token", value) for value in values]
    return settings


_SETTINGS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "add_bos_token": ("true or false", lambda value: isinstance(value, bool)),
    "clean_up_tokenization_spaces": ("true or false", lambda value: isinstance(value, bool)),
    "padding_side": ("left or right", lambda value: value in SIDES),
    "truncation_side": ("left or right", lambda value: value in SIDES),
    "model_max_length": ("a positive number", lambda value: isinstance(value, int | float) and value >= 1),
}
"""Keys of `tokenizer_config.json` that are arguments of `OPTTokenizer`: what they must be."""


def _setting(directory: Path, name: str, value: Any) -> Any:
    """A value of `tokenizer_config.json`, if it is what the key wants."""
    expected, is_valid = _SETTINGS[name]
    if not is_valid(value):
        raise TokenizerError(f"{directory}: tokenizer_config.json has {name} {value!r}, expected {expected}. Mend it.")
    # "No limit" is written as 1e30 and as the integer next to it.
    return min(int(min(value, 1e30)), VERY_LONG) if name == "model_max_length" else value


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object out of a file, an empty one if there is no file."""
    try:
        value: Any = read_json(path, most=_MAX_BYTES)
    except FileNotFoundError:
        return {}
    except UnreadableError as error:
        raise TokenizerError(f"{path} is not readable as JSON: {error}. Fetch the file again.") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: expected a JSON object, got {type(value).__name__}. Fetch the file again.")
    return cast("dict[str, Any]", value)


def _read_vocabulary(directory: Path, *, add_prefix_space: bool) -> "Tokenizer":
    """Byte-level BPE out of `vocab.json` and `merges.txt`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab_path, merges_path = directory / "vocab.json", directory / "merges.txt"
    missing = [path.name for path in (vocab_path, merges_path) if not path.is_file()]
    if missing:
        raise TokenizerError(
            f"No {' and no '.join(missing)} in {directory}, expected vocab.json and merges.txt, or tokenizer.json. "
            f"Name a directory that holds a tokenizer."
        )
    vocabulary = _read_object(vocab_path)
    ids = list(vocabulary.values())
    if (
        not ids
        or not all(type(token_id) is int and 0 <= token_id < 2**32 for token_id in ids)
        or len(set(ids)) < len(ids)
    ):
        raise TokenizerError(
            f"{vocab_path}: expected a different id, an integer from 0, for every token. Fetch it again."
        )
    try:
        engine: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=_read_merges(merges_path)))
    except Exception as error:  # the library raises bare exceptions
        raise TokenizerError(f"{merges_path} does not fit {vocab_path.name}: {error}. Fetch both again.") from None
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    engine.decoder = decoders.ByteLevel()
    return engine


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """The merges of a `merges.txt`: one a line, two tokens and a space between them, under a line with the version."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path} is not readable: {error}. Fetch the file again.") from None
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, start=1):
        text = line.removesuffix("\r")
        if not text or (number == 1 and text.startswith("#version")):
            continue
        first, _, second = text.partition(" ")
        if not first or not second or " " in second:
            raise TokenizerError(
                f"{path}, line {number}: got {text[:40]!r}, expected two tokens. Fetch the file again."
            )
        merges.append((first, second))
    return merges


def _read_tokenizer_json(path: Path) -> "Tokenizer":
    """The tokenizer of a `tokenizer.json`, whose model must be BPE."""
    from tokenizers import Tokenizer, models

    try:
        engine = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        raise TokenizerError(f"{path} is no tokenizer: {error}. Fetch the file again.") from None
    if not isinstance(engine.model, models.BPE):
        raise TokenizerError(
            f"{path} holds a {type(engine.model).__name__} model, expected the BPE of an OPT tokenizer."
        )
    return engine


def _add_tokens(directory: Path, engine: "Tokenizer", config: dict[str, Any]) -> None:
    """Add the tokens that `tokenizer_config.json` and `added_tokens.json` list, under the ids that they give."""
    decoder: Any = config.pop("added_tokens_decoder", {})
    if not isinstance(decoder, dict):
        raise TokenizerError(f"{directory}: added_tokens_decoder is {decoder!r}, expected an object of ids and tokens.")
    by_token = _read_object(directory / "added_tokens.json")
    listed: dict[Any, Any] = {**{token_id: token for token, token_id in by_token.items()}, **decoder}
    try:
        tokens = {int(token_id): value for token_id, value in listed.items()}
    except (TypeError, ValueError):
        raise TokenizerError(f"{directory}: the ids of added tokens are {list(listed)}, expected integers.") from None
    known = engine.get_added_tokens_decoder()
    for token_id, value in sorted(tokens.items()):
        token = _added_token("an added token", value)
        if token_id not in known:
            add_token(engine, token)
        if engine.token_to_id(token.content) != token_id:
            raise TokenizerError(
                f"{directory} adds {token.content!r} as id {token_id}, but by its vocabulary that token is "
                f"{engine.token_to_id(token.content)}. Fetch all of the tokenizer's files again."
            )


def _added_token(name: str, value: Any, *, special: bool = False) -> "AddedToken":
    """A token out of a text, or out of the dict that Hugging Face writes."""
    from tokenizers import AddedToken

    if isinstance(value, str) and value:
        return AddedToken(value, special=special)
    fields = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    content = fields.get("content")
    if not isinstance(content, str) or not content:
        raise TokenizerError(f'{name} is {value!r}, expected a text or an object with its "content".')
    flags = {flag: fields[flag] for flag in ("single_word", "lstrip", "rstrip", "normalized") if flag in fields}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise TokenizerError(f"{name} is {value!r}, expected flags that are true or false.")
    return AddedToken(content, **flags, special=special or fields.get("special") is True)


def _add_special(engine: "Tokenizer", name: str, value: Any) -> str:
    """Have an engine know a special token; its text."""
    token = _added_token(name, value, special=True)
    added = engine.get_added_tokens_decoder()
    token_id = engine.token_to_id(token.content)
    if token_id is None or token_id not in added or not added[token_id].special:
        add_token(engine, token)
    return token.content


def add_token(engine: "Tokenizer", token: "AddedToken") -> None:
    """Add a token at the end of a vocabulary, or have a token that it has found as a whole in every text."""
    untyped: Any = engine
    if token.special:
        untyped.add_special_tokens([token])
    else:
        untyped.add_tokens([token])


def template(engine: "Tokenizer") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that an engine's own post-processor puts in front of and behind a text."""
    encoding = engine.encode("a", add_special_tokens=True)
    mask = encoding.special_tokens_mask
    start = mask.index(0) if 0 in mask else len(mask)
    end = len(mask) - (mask[::-1].index(0) if 0 in mask else 0)
    return tuple(encoding.ids[:start]), tuple(encoding.ids[end:])
