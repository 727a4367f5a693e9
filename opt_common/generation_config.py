"""The settings of text generation: `generation_config.json` and the keywords of `generate`."""

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, cast

import numpy as np

from opt_common.config import OPTConfig
from opt_common.constraints import Constraint, DisjunctiveConstraint, PhrasalConstraint
from opt_common.errors import GenerationError, join_problems
from opt_common.json_file import UnreadableError, read_json
from opt_common.native_files import home_of
from opt_common.strategies import (
    ASSISTED_STRATEGIES,
    BEAM_STRATEGIES,
    TOKEN_BY_TOKEN,
    conflicting_settings,
    strategy_of,
    useless_settings,
)
from opt_common.watermark import WatermarkingConfig

DEFAULT_TOP_K = 50
"""How many tokens sampling chooses from, when nothing is said: Hugging Face's default."""

DEFAULT_ASSISTANT_TOKENS = 5
"""How many tokens an assistant guesses, when nothing is said; Hugging Face has 20, but stops at an unsure one."""

DEFAULT_NGRAM_SIZE = 2
"""How many last tokens prompt lookup looks for, when nothing is said: Hugging Face's default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to continue a prompt. Names, meanings and defaults are Hugging Face's, except for `seed`.

    How much:

    Args:
        max_new_tokens: how many tokens to append at most; takes precedence over `max_length`.
        max_length: how many tokens prompt and continuation have together at most; None means 20.
        min_new_tokens: no row ends before it has this many new tokens.
        min_length: no row ends before prompt and continuation have this many tokens together. Lengths of prompt and
            continuation together count the padding of a batch, as Hugging Face does.
        eos_token_id: ids that end a row: one, several or none.
        pad_token_id: what a finished row emits; None means the first of `eos_token_id`.
        bos_token_id: id in front of every text.
        stop_strings: one or several texts, each of which ends a row that it occurs in, wherever its tokens begin. The
            token that completes it is a row's last one. `generate` then needs the tokenizer.
        max_time: seconds after which every row ends, at the earliest after its first token.

    How tokens are chosen:

        do_sample: draw each token by its probability; False takes the likeliest one.
        seed: (sampling) integer from 0 on that decides every draw, in every framework alike; None draws a new one.
        num_return_sequences: (sampling, beams) how many continuations of each prompt; those of one prompt follow each
            other. With beams at most `num_beams`, best first.
        temperature: (sampling) scores are divided by it.
        top_k: (sampling) keep the k best tokens and those equal to the last of them; 0 keeps all, None means 50. In
            contrastive search, how many candidates there are for each token.
        top_p: (sampling) keep the fewest likeliest tokens whose probabilities sum to more than this; 1 keeps all.
        min_p: (sampling) keep tokens with at least this share of the likeliest one's probability.
        typical_p: (sampling) keep the fewest tokens, those nearest to the expected information first, whose
            probabilities sum to this; 1 keeps all.
        epsilon_cutoff: (sampling) keep tokens of at least this probability; 0 keeps all.
        eta_cutoff: (sampling) as `epsilon_cutoff`, lowered where the distribution is broad; 0 keeps all.
        penalty_alpha: (contrastive search, see `opt_common.contrastive`) from 0 to 1: how much a candidate's likeness
            to the text before counts against its probability; 0 and None search otherwise.
        dola_layers: (DoLa, see `opt_common.dola`) which layers the last one is contrasted with: "low", "high" or their
            numbers from 0, the embeddings, on; None contrasts nothing.
        guidance_scale: (see `opt_common.guidance`) how much counts what the prompt makes likelier than the negative
            prompt, or its own last token, would; None and 1 take scores as they are.

    Guesses, see `opt_common.assisted`; they change how soon a text is there, and one prompt is continued at a time:

        assistant_model: a smaller language model of the same class and vocabulary, which guesses tokens. It is in no
            file.
        num_assistant_tokens: (assistant_model) how many it guesses for each step; None means 5.
        prompt_lookup_num_tokens: how many tokens are guessed for each step by looking where the text went on like this
            before; 0 guesses none.
        max_matching_ngram_size: (prompt lookup) how many of the last tokens are looked for at most; None means 2.

    Beams, see `opt_common.beams`:

        num_beams: how many continuations of each prompt are kept; 1 keeps no beams.
        early_stopping: True stops at `num_beams` finished texts; False when no beam would be better as it is; "never"
            when no beam can become better.
        length_penalty: a text's score is its sum of log-probabilities over its length to the power of this: above 0
            favours long texts, below 0 short ones.
        num_beam_groups: how many groups the beams are divided into; in each step one chooses after the other.
        diversity_penalty: (groups) what a token's score loses for each beam of the groups before that has chosen it.
        force_words_ids: what the new tokens must contain: phrases (lists of ids) and lists of phrases, one of which
            will do.
        constraints: the same as `PhrasalConstraint` and `DisjunctiveConstraint`.

    What is discouraged or forbidden:

        repetition_penalty: positive scores of tokens that the row already has, prompt included, are divided by this,
            negative ones multiplied; 1 changes nothing. Padding is no part of a row.
        no_repeat_ngram_size: no sequence of this many tokens occurs twice; 0 allows all.
        bad_words_ids: sequences of ids that are never completed. A single end-of-text id among them is ignored.
        sequence_bias: pairs of a sequence of ids and what is added to the score of its last token wherever the text
            ends with the rest; a mapping from tuples of ids does as well.
        forced_bos_token_id: the second token of the text, where the prompt has one.
        forced_eos_token_id: one or several ids, one of which is the last token that `max_length` has room for.
        suppress_tokens: ids that never occur.
        begin_suppress_tokens: ids that are not the first new token.
        exponential_decay_length_penalty: (start, factor): from `start` new tokens on, end-of-text scores grow by
            `factor` with each token.
        renormalize_logits: make scores log-probabilities again after all else.
        watermarking_config: a `WatermarkingConfig`, or a dict of its fields, that marks the text.

    What comes back:

        return_dict_in_generate: a `GenerateOutput` with each new token's log-probability, not the ids alone.
        output_scores: (return_dict_in_generate) every step's scores of the whole vocabulary, after all of the above.
        output_logits: (return_dict_in_generate) likewise, as the model gave them.

        use_cache: False computes every step from the whole text, which is slow and gives the same tokens.
        extra: every other key of the file that was read; written back as it came.

    Raises:
        GenerationError: naming every setting that cannot be.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    min_length: int = 0
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    stop_strings: tuple[str, ...] = ()
    max_time: float | None = None
    do_sample: bool = False
    seed: int | None = None
    num_return_sequences: int = 1
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    penalty_alpha: float | None = None
    dola_layers: str | tuple[int, ...] | None = None
    guidance_scale: float | None = None
    assistant_model: Any = dataclasses.field(default=None, compare=False, repr=False)
    num_assistant_tokens: int | None = None
    prompt_lookup_num_tokens: int = 0
    max_matching_ngram_size: int | None = None
    num_beams: int = 1
    early_stopping: bool | str = False
    length_penalty: float = 1.0
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    force_words_ids: tuple[tuple[tuple[int, ...], ...], ...] = ()
    constraints: tuple[Constraint, ...] = ()
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    exponential_decay_length_penalty: tuple[int, float] | None = None
    renormalize_logits: bool = False
    return_dict_in_generate: bool = False
    output_scores: bool = False
    output_logits: bool = False
    watermarking_config: WatermarkingConfig | None = None
    use_cache: bool = True
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any], hash=False)

    def __post_init__(self) -> None:
        problems: list[str] = []
        for name, rule in _RULES.items():
            value = getattr(self, name)
            if value is None and getattr(type(self), name, ()) is None:
                continue
            try:
                object.__setattr__(self, name, rule.read(value))
            except GenerationError as error:
                problems.append(str(error))
            except (TypeError, ValueError):
                problems.append(f"{name} is {value!r}, expected {rule.expected}.")
        if self.exponential_decay_length_penalty is not None and not self.eos_token_id:
            problems.append(
                "exponential_decay_length_penalty raises the score of eos_token_id, of which there is none."
            )
        if not problems:
            problems = conflicting_settings(self)
        if problems:
            raise GenerationError(join_problems(problems))

    @property
    def strategy(self) -> str:
        """The name of the one strategy that these settings ask for; see `opt_common.strategies`."""
        return strategy_of(self)

    @property
    def guesses(self) -> int:
        """How many tokens are guessed for each step."""
        if self.strategy not in ASSISTED_STRATEGIES:
            return 0
        if self.assistant_model is None:
            return self.prompt_lookup_num_tokens
        return self.num_assistant_tokens or DEFAULT_ASSISTANT_TOKENS

    @property
    def all_constraints(self) -> tuple[Constraint, ...]:
        """What the new tokens must contain, however it was said."""
        return (*self.constraints, *map(DisjunctiveConstraint, self.force_words_ids))

    @property
    def streams(self) -> bool:
        """Whether tokens are final as soon as they are chosen, so that a text can be shown as it grows."""
        return self.strategy in TOKEN_BY_TOKEN

    @property
    def guided(self) -> bool:
        """Whether scores are compared with those after other prompts."""
        return self.guidance_scale not in {None, 1}

    @property
    def copies(self) -> int:
        """How many rows each prompt begins with: one a continuation, but one alone where beams branch off it."""
        return 1 if self.strategy in BEAM_STRATEGIES else self.num_return_sequences

    @classmethod
    def from_model_config(cls, config: OPTConfig) -> Self:
        """The settings a model has when it comes without a `generation_config.json`."""
        eos: Any = config.eos_token_id
        return cls(eos_token_id=eos, pad_token_id=config.pad_token_id, bos_token_id=config.bos_token_id)

    @classmethod
    def from_directory(cls, directory: Path, config: OPTConfig) -> Self:
        """The settings of a checkpoint: its `generation_config.json`, or what its model configuration says.

        Args:
            directory: what the weights were loaded from: a directory, or a file in it.
            config: the model's configuration.

        Raises:
            GenerationError: if the file is damaged or asks for what is not available.
        """
        path = home_of(directory) / "generation_config.json"
        defaults = cls.from_model_config(config)
        if not path.is_file():
            return defaults
        try:
            values = read_json(path)
        except (FileNotFoundError, UnreadableError) as error:
            raise GenerationError(f"{path} is not readable as JSON: {error}. Fetch it again, or delete it.") from None
        if not isinstance(values, dict):
            raise GenerationError(f"{path}: expected a JSON object, got {type(values).__name__}. Fetch it again.")
        extra = cast(dict[str, Any], values)
        fields = {name: extra.pop(name) for name in _IN_FILES & extra.keys()}
        # Hugging Face writes null where it means the default.
        fields = {name: value for name, value in fields.items() if value is not None or name in _OPTIONAL}
        return dataclasses.replace(defaults, **fields, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """The contents of a `generation_config.json`: what differs from the defaults."""
        values = {name: getattr(self, name) for name in _IN_FILES}
        values = {name: value for name, value in values.items() if value != getattr(_DEFAULTS, name)}
        for name in ("eos_token_id", "forced_eos_token_id"):
            if name in values:
                values[name] = values[name][0] if len(values[name]) == 1 else list(values[name])
        if values.pop("constraints", ()) or self.force_words_ids:
            words = [constraint.phrases for constraint in self.all_constraints]
            values["force_words_ids"] = [list(phrases[0]) if len(phrases) == 1 else phrases for phrases in words]
        if self.watermarking_config is not None:
            values["watermarking_config"] = dataclasses.asdict(self.watermarking_config)
        return {**self.extra, **values}

    @property
    def padding(self) -> int:
        """What a finished row emits."""
        return next((token for token in (self.pad_token_id, *self.eos_token_id) if token is not None), 0)

    def updated(self, **settings: Any) -> Self:
        """A copy with some settings changed; None leaves a setting as it is.

        Raises:
            GenerationError: for a name that is no setting, a value that cannot be, or a setting that does nothing
                with the strategy in force.
        """
        if unknown := settings.keys() - _FIELDS:
            known = ", ".join(sorted(_FIELDS))
            raise GenerationError(f"generate() has no setting {', '.join(sorted(unknown))}; it has {known}.")
        given = {name: value for name, value in settings.items() if value is not None}
        changed = dataclasses.replace(self, **given)
        if problems := useless_settings(given, changed):
            raise GenerationError(join_problems(problems))
        return changed


@dataclasses.dataclass(frozen=True)
class _Rule:
    """How a field is read: `read` brings a value into its one form, or raises ValueError or TypeError."""

    expected: str
    read: Callable[[Any], Any]


def _count(lowest: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        number = operator.index(value)
        if value is True or value is False or number < lowest:
            raise ValueError
        return number

    return read


_id = _count(0)


def _number(low: float, high: float, *, open_below: bool = False) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise TypeError
        number = float(cast(float, value))
        if not (low <= number <= high) or (open_below and number == low) or math.isinf(number):
            raise ValueError
        return number

    return read


def _flag(value: Any) -> bool:
    if value is not True and value is not False:
        raise TypeError
    return value


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)


def _ids(value: Any) -> tuple[int, ...]:
    several: Any = value if value is None or _is_list(value) else (value,)
    return tuple(map(_id, several or ()))


def _sequence(value: Any) -> tuple[int, ...]:
    ids = tuple(map(_id, value))
    if not ids:
        raise ValueError
    return ids


def _sequences(value: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(map(_sequence, value or ()))


def _biases(value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    pairs: Any = cast(Mapping[Any, Any], value).items() if isinstance(value, Mapping) else value or ()
    return tuple((_sequence(ids), _number(-math.inf, math.inf)(bias)) for ids, bias in pairs)


def _stopping(value: Any) -> bool | str:
    if value != "never":
        return _flag(value)
    return value


def _words(value: Any) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Phrases and lists of phrases, each as a list of phrases."""
    words: tuple[Any, ...] = tuple(value or ())
    if any(not _is_list(word) or not word for word in words):
        raise ValueError
    return tuple(_sequences(word if _is_list(word[0]) else [word]) for word in words)


def _constraints(value: Any) -> tuple[Constraint, ...]:
    constraints: tuple[Any, ...] = tuple(value or ())
    if not all(isinstance(constraint, PhrasalConstraint | DisjunctiveConstraint) for constraint in constraints):
        raise TypeError
    return constraints


def _texts(value: Any) -> tuple[str, ...]:
    several: tuple[Any, ...] = (value,) if isinstance(value, str) else tuple(value or ())
    if not all(isinstance(text, str) and text for text in several):
        raise ValueError
    return several


def _layers(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str):
        if value not in {"low", "high"}:
            raise ValueError
        return value
    return _sequence(value)


def _decay(value: Any) -> tuple[int, float]:
    start, factor = value
    return _id(start), _number(0, math.inf, open_below=True)(factor)


_COUNT = _Rule("an integer from 0 on", _id)
_ONE_ID = _Rule("an id or None", _id)
_POSITIVE = _Rule("a positive integer", _count(1))
_PROBABILITY = _Rule("a number from 0 to 1", _number(0, 1))
_FACTOR = _Rule("a number above 0", _number(0, math.inf, open_below=True))
_NUMBER = _Rule("a number", _number(-math.inf, math.inf))
_FLAG = _Rule("True or False", _flag)
_ID_LIST = _Rule("an id, a list of ids or None", _ids)

_RULES = {
    "max_new_tokens": _POSITIVE,
    "max_length": _POSITIVE,
    "min_new_tokens": _COUNT,
    "min_length": _COUNT,
    "eos_token_id": _ID_LIST,
    "pad_token_id": _ONE_ID,
    "bos_token_id": _ONE_ID,
    "stop_strings": _Rule("a text or a list of texts, none of them empty", _texts),
    "max_time": _Rule("a number of seconds above 0", _number(0, math.inf, open_below=True)),
    "do_sample": _FLAG,
    "seed": _COUNT,
    "num_return_sequences": _POSITIVE,
    "temperature": _FACTOR,
    "top_k": _COUNT,
    "top_p": _PROBABILITY,
    "min_p": _PROBABILITY,
    "typical_p": _Rule("a number above 0, up to 1", _number(0, 1, open_below=True)),
    "epsilon_cutoff": _PROBABILITY,
    "eta_cutoff": _PROBABILITY,
    "penalty_alpha": _PROBABILITY,
    "dola_layers": _Rule('"low", "high" or a list of numbers of layers from 0 on', _layers),
    "guidance_scale": _NUMBER,
    "num_assistant_tokens": _POSITIVE,
    "prompt_lookup_num_tokens": _COUNT,
    "max_matching_ngram_size": _POSITIVE,
    "num_beams": _POSITIVE,
    "early_stopping": _Rule('True, False or "never"', _stopping),
    "length_penalty": _NUMBER,
    "num_beam_groups": _POSITIVE,
    "diversity_penalty": _Rule("a number from 0 on", _number(0, math.inf)),
    "force_words_ids": _Rule("a list of phrases (lists of ids) and lists of phrases, none of them empty", _words),
    "constraints": _Rule("a list of PhrasalConstraint and DisjunctiveConstraint", _constraints),
    "repetition_penalty": _FACTOR,
    "no_repeat_ngram_size": _COUNT,
    "bad_words_ids": _Rule("a list of lists of ids, none of them empty", _sequences),
    "sequence_bias": _Rule("a list of [list of ids, number] or a dict from tuples of ids to numbers", _biases),
    "forced_bos_token_id": _ONE_ID,
    "forced_eos_token_id": _ID_LIST,
    "suppress_tokens": _ID_LIST,
    "begin_suppress_tokens": _ID_LIST,
    "exponential_decay_length_penalty": _Rule("(start, factor): an integer from 0 on and a number above 0", _decay),
    "renormalize_logits": _FLAG,
    "return_dict_in_generate": _FLAG,
    "output_scores": _FLAG,
    "output_logits": _FLAG,
    "watermarking_config": _Rule("a WatermarkingConfig, a dict of its fields or None", WatermarkingConfig.read),
    "use_cache": _FLAG,
}

_FIELDS = frozenset(field.name for field in dataclasses.fields(GenerationConfig)) - {"extra"}
_IN_FILES = _FIELDS - {"assistant_model"}
_DEFAULTS = GenerationConfig()
_OPTIONAL = frozenset({"eos_token_id"} | {name for name in _FIELDS if getattr(_DEFAULTS, name) is None})
