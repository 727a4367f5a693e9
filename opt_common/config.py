"""`OPTConfig`: what makes one OPT model differ from another.

The fields, their names and their defaults are those of Hugging Face's `OPTConfig`, so that a published `config.json`
reads and writes unchanged. The sizes are those of metaseq's `opt_job_constants.py`.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from opt_common.errors import ConfigError, join_problems
from opt_common.json_file import UnreadableError, read_json

POSITION_OFFSET = 2
"""Rows of the position table in front of position 0: metaseq numbers positions from `padding_idx + 1`."""

LAYER_NORM_EPS = 1e-5
"""Added to the variance in every layer norm; no OPT configuration changes it."""

ACTIVATIONS = ("relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "silu", "swish", "tanh")
"""Values of `activation_function` that every backend computes; `opt_common.reference` defines each of them."""

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
"""Values of `problem_type`: which loss a sequence classifier has."""

QUANTIZATIONS = ("int8-dynamic", "int8", "int4")
"""Values of `quantization`; `opt_common.quantization` defines each of them."""

_DEFAULT_NUM_LABELS = 2
_MOST_UNNAMED_LABELS = 20_000  # their names are made up: a number alone must not take much memory

_SIZES: Mapping[str, Mapping[str, Any]] = {
    "125m": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12},
    "350m": {
        "num_hidden_layers": 24,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "word_embed_proj_dim": 512,
        "do_layer_norm_before": False,
    },
    "1.3b": {"num_hidden_layers": 24, "hidden_size": 2048, "num_attention_heads": 32},
    "2.7b": {"num_hidden_layers": 32, "hidden_size": 2560, "num_attention_heads": 32},
    "6.7b": {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32},
    "13b": {"num_hidden_layers": 40, "hidden_size": 5120, "num_attention_heads": 40},
    "30b": {"num_hidden_layers": 48, "hidden_size": 7168, "num_attention_heads": 56},
    "66b": {"num_hidden_layers": 64, "hidden_size": 9216, "num_attention_heads": 72},
    "175b": {"num_hidden_layers": 96, "hidden_size": 12288, "num_attention_heads": 96},
}

SIZES = tuple(_SIZES)
"""Names of the released sizes, smallest first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OPTConfig:
    """The shape and the options of one OPT model. Immutable; `replace` makes a changed copy.

    Only `use_cache` may be assigned, which is no property of a model: `transformers.Trainer` switches it off so.

    Args:
        vocab_size: V, rows of the token table.
        hidden_size: D, width of the residual stream.
        num_hidden_layers: L, number of decoder layers.
        ffn_dim: F, width inside the feed-forward blocks.
        max_position_embeddings: longest sequence; the position table has `POSITION_OFFSET` more rows.
        do_layer_norm_before: True for pre-norm layers; False (350m) for post-norm ones, which have no final norm.
        _remove_final_layer_norm: drop the decoder's final norm of a pre-norm model (checkpoints of before June 2022).
        word_embed_proj_dim: E, width of the token table and of the head; None means `hidden_size`.
        dropout: probability of dropping an element of each residual branch's output during training.
        attention_dropout: probability of dropping an attention probability during training.
        num_attention_heads: N; must divide `hidden_size`.
        activation_function: one of `ACTIVATIONS`.
        layerdrop: probability of skipping a whole layer during training.
        init_std: standard deviation of the normal distribution of new weights.
        use_cache: whether a forward call returns a KV cache when it is not told.
        pad_token_id: id of padding, or None. Its row of the token table gets no gradient from the input side.
        bos_token_id: id in front of every text, or None.
        eos_token_id: id that ends a text, or None.
        enable_bias: whether the linear layers inside the decoder layers have biases.
        layer_norm_elementwise_affine: whether the layer norms have a scale and a shift.
        tie_word_embeddings: whether the head is the token table.
        num_labels: C, outputs of a sequence classifier; None means as many as `id2label` has, which without it are
            two. A `config.json` holds the labels instead of their number.
        id2label: name of each output; None means "LABEL_0", "LABEL_1", ….
        label2id: output of each name; None means the inverse of `id2label`.
        problem_type: one of `PROBLEM_TYPES`, or None: each call with labels then infers it (`problem_type_of`).
        quantization: one of `QUANTIZATIONS`: matrices are in few bits, in the checkpoint or from when they are loaded;
            None: they are not.
        dtype: dtype that the checkpoint's tensors are stored in ("float16", …), or None when unknown.
        extra: every other key of the `config.json` that was read; written back as it came.

    Raises:
        ConfigError: naming every field whose value no model can have.
    """

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    ffn_dim: int = 3072
    max_position_embeddings: int = 2048
    do_layer_norm_before: bool = True
    _remove_final_layer_norm: bool = False
    word_embed_proj_dim: int = None  # pyright: ignore[reportAssignmentType]  # None only until __post_init__
    dropout: float = 0.1
    attention_dropout: float = 0.0
    num_attention_heads: int = 12
    activation_function: str = "relu"
    layerdrop: float = 0.0
    init_std: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 2
    eos_token_id: int | None = 2
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True
    # None only until __post_init__:
    num_labels: int = None  # pyright: ignore[reportAssignmentType]
    id2label: Mapping[int, str] = dataclasses.field(default=None, hash=False)  # pyright: ignore[reportAssignmentType]
    label2id: Mapping[str, int] = dataclasses.field(default=None, hash=False)  # pyright: ignore[reportAssignmentType]
    problem_type: str | None = None
    quantization: str | None = None
    dtype: str | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any], hash=False)

    model_type: ClassVar[str] = "opt"
    """What Hugging Face's libraries call the architecture."""

    def __post_init__(self) -> None:
        if self.word_embed_proj_dim is None:  # pyright: ignore[reportUnnecessaryComparison]
            object.__setattr__(self, "word_embed_proj_dim", self.hidden_size)
        for name, value in _labels(self.num_labels, self.id2label, self.label2id).items():
            object.__setattr__(self, name, value)
        if problems := _problems(self):
            raise ConfigError("OPTConfig: " + join_problems(problems))

    @property
    def head_dim(self) -> int:
        """H, width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def has_projection(self) -> bool:
        """Whether `project_in` and `project_out` stand between token table and decoder (350m)."""
        return self.word_embed_proj_dim != self.hidden_size

    @property
    def has_final_layer_norm(self) -> bool:
        """Whether the decoder normalises its output: pre-norm models do, unless they were told not to."""
        return self.do_layer_norm_before and not self._remove_final_layer_norm

    @classmethod
    def from_size(cls, size: str, **changes: Any) -> Self:
        """The configuration of a released size: "125m", "350m", "1.3b", … "175b".

        Raises:
            ConfigError: for a size that was never released.
        """
        if size not in _SIZES:
            raise ConfigError(f"OPTConfig.from_size: got {size!r}, expected one of {', '.join(SIZES)}.")
        shape = dict(_SIZES[size])
        return cls(**{"ffn_dim": 4 * shape["hidden_size"], **shape, **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read the contents of a `config.json`. Keys that are not fields are kept in `extra`.

        That of a BLIP-2 model holds an OPT's as its `text_config`, which is read then.

        Raises:
            ConfigError: for another model type, or naming every bad field.
        """
        values = dict(values)
        if values.get("model_type") == "blip-2" and isinstance(values.get("text_config"), Mapping):
            values = dict(cast("Mapping[str, Any]", values["text_config"]))
        model_type = values.pop("model_type", cls.model_type)
        if model_type != "opt":
            raise ConfigError(
                f"config.json: got model_type {model_type!r}, expected 'opt'. This package has no other model."
            )
        # Files written before transformers 4.56 say `torch_dtype`; later ones say `dtype`.
        stored = values.pop("torch_dtype", None)
        values["dtype"] = values.get("dtype") or stored
        if isinstance(values["dtype"], str):
            values["dtype"] = values["dtype"].removeprefix("torch.")
        fields = {key: values.pop(key) for key in _FIELDS & values.keys()}
        return cls(**fields, extra=values)

    @classmethod
    def from_json_file(cls, path: str | Path) -> Self:
        """Read a `config.json`.

        Raises:
            ConfigError: if the file is absent, is not a JSON object, or describes no OPT model.
        """
        path = Path(path)
        try:
            values = read_json(path)
        except FileNotFoundError:
            raise ConfigError(
                f"No {path.name} in {path.parent}. Name a directory that holds an OPT checkpoint."
            ) from None
        except UnreadableError as error:
            raise ConfigError(f"{path} is not readable as JSON: {error}. Fetch the file again.") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected a JSON object, got {type(values).__name__}. Fetch the file again.")
        return cls.from_dict(cast(dict[str, Any], values))

    def to_dict(self) -> dict[str, Any]:
        """The contents of a `config.json` that `from_dict` and Hugging Face read back to the same model."""
        values = {**self.extra, **{name: getattr(self, name) for name in _FIELDS}}
        # As Hugging Face writes them: the labels, unless they are the default ones, and never their number.
        del values["num_labels"]
        if _labels(None, None, None) == {name: getattr(self, name) for name in ("num_labels", "id2label", "label2id")}:
            del values["id2label"], values["label2id"]
        for name in ("problem_type", "quantization"):
            if values[name] is None:
                del values[name]
        # Every version of transformers reads `torch_dtype`; only recent ones read `dtype`.
        values["torch_dtype"] = values.pop("dtype")
        if values["torch_dtype"] is None:
            del values["torch_dtype"]
        return {"model_type": self.model_type, **dict(sorted(values.items()))}

    def to_json(self) -> str:
        """`to_dict` as the text of a file: indented, keys sorted, one newline at the end.

        Raises:
            ConfigError: if `extra` is nested so deep that no JSON can be made of it.
        """
        try:
            return json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        except RecursionError:
            raise ConfigError(
                "OPTConfig: extra is nested too deep for a JSON file. Remove what is not needed."
            ) from None

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed. Changed labels change their number, and a changed number the labels."""
        labels = {"num_labels", "id2label", "label2id"}
        if labels & changes.keys():
            changes = {**dict.fromkeys(labels), **changes}
        return dataclasses.replace(self, **changes)


def _assign(config: OPTConfig, name: str, value: object) -> None:
    if name != "use_cache":
        raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}: use config.replace({name}=…)")
    if not isinstance(value, bool):
        raise ConfigError(f"OPTConfig: use_cache is {value!r}, expected true or false.")
    object.__setattr__(config, name, value)


OPTConfig.__setattr__ = _assign  # a frozen dataclass can't define it itself

_FIELDS = frozenset(field.name for field in dataclasses.fields(OPTConfig)) - {"extra"}


def problem_type_of(config: OPTConfig, labels_dtype: object) -> str:
    """THE rule of a sequence classifier's loss: `problem_type`, or what Hugging Face infers where it is None.

    One output makes a regression; integer labels choose one of several outputs; others say yes or no to each. What is
    inferred holds for one call: Hugging Face stores it in the configuration, where a second kind of labels then fails.

    Args:
        config: the model's configuration.
        labels_dtype: dtype of the labels, of NumPy or of any of the three frameworks.
    """
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    # In every framework the names of the integer dtypes, and no others, contain these letters.
    return "single_label_classification" if "int" in str(labels_dtype) else "multi_label_classification"


def _numbered_labels(count: int) -> dict[int, str]:
    return {index: f"LABEL_{index}" for index in range(count)}


def _labels(num_labels: Any, id2label: Any, label2id: Any) -> dict[str, Any]:
    """The three fields about labels, each derived from the others where it is None; `_problems` judges the result."""
    if id2label is None and isinstance(label2id, Mapping):
        id2label = _inverse(cast("Mapping[Any, Any]", label2id)) or {}
    if id2label is None:
        count = _DEFAULT_NUM_LABELS if num_labels is None else num_labels
        id2label = _numbered_labels(count if _is_int(count) and count <= _MOST_UNNAMED_LABELS else 0)
    elif isinstance(id2label, Mapping):
        # JSON has texts for keys.
        items = cast("Mapping[Any, Any]", id2label).items()
        id2label = {int(key) if _is_number_text(key) else key: name for key, name in items}
    if label2id is None and isinstance(id2label, Mapping):
        label2id = _inverse(cast("Mapping[Any, Any]", id2label))
    if num_labels is None and isinstance(id2label, Mapping):
        num_labels = len(cast("Mapping[Any, Any]", id2label))
    return {"num_labels": num_labels, "id2label": id2label, "label2id": label2id}


def _inverse(labels: Mapping[Any, Any]) -> dict[Any, Any] | None:
    """Values -> keys; None where a value can be no key, which is no label either."""
    try:
        return {value: key for key, value in labels.items()}
    except TypeError:
        return None


def _is_number_text(key: object) -> bool:
    # No label has a number of more digits, and Python refuses to read one of thousands.
    return isinstance(key, str) and len(key) < 20 and key.isascii() and key.isdecimal()


def _label_problems(config: OPTConfig) -> list[str]:
    """What is wrong with the fields of sequence classification."""
    problems: list[str] = []
    id2label, label2id, problem_type = cast(
        "tuple[Any, Any, Any]", (config.id2label, config.label2id, config.problem_type)
    )
    if not isinstance(id2label, Mapping):
        return [f"id2label is {id2label!r}, expected a name for the number of each output."]
    if not _is_int(config.num_labels) or config.num_labels < 1:
        return [f"num_labels is {config.num_labels!r}, expected a positive integer."]
    names = cast("Mapping[Any, Any]", id2label)
    if len(names) != config.num_labels or not all(index in names for index in range(len(names))):
        problems.append(
            f"id2label is {id2label!r:.200}, expected a name for each output from 0 to num_labels - 1 "
            f"({config.num_labels - 1}). More than {_MOST_UNNAMED_LABELS} outputs have to be named."
        )
    if not isinstance(label2id, Mapping):
        problems.append(f"label2id is {label2id!r}, expected the number of the output for each name.")
    if problem_type is not None and problem_type not in PROBLEM_TYPES:
        problems.append(f"problem_type is {problem_type!r}, expected null or one of {', '.join(PROBLEM_TYPES)}.")
    return problems


def _problems(config: OPTConfig) -> list[str]:
    """Everything about `config` that no model can have, a sentence each."""
    problems: list[str] = []

    def check(name: str, holds: bool, expected: str) -> bool:
        if not holds:
            problems.append(f"{name} is {getattr(config, name)!r}, expected {expected}.")
        return holds

    sizes = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "ffn_dim",
        "max_position_embeddings",
        "word_embed_proj_dim",
        "num_attention_heads",
    )
    valid_sizes = [
        check(name, _is_int(getattr(config, name)) and getattr(config, name) > 0, "a positive integer")
        for name in sizes
    ]
    if all(valid_sizes):
        check(
            "hidden_size",
            config.hidden_size % config.num_attention_heads == 0,
            f"a multiple of num_attention_heads ({config.num_attention_heads})",
        )
    for name in (
        "do_layer_norm_before",
        "_remove_final_layer_norm",
        "use_cache",
        "enable_bias",
        "layer_norm_elementwise_affine",
        "tie_word_embeddings",
    ):
        check(name, isinstance(getattr(config, name), bool), "true or false")
    for name in ("dropout", "attention_dropout", "layerdrop"):
        check(name, _is_number(getattr(config, name)) and 0 <= getattr(config, name) <= 1, "a probability from 0 to 1")
    check("init_std", _is_number(config.init_std) and 0 <= config.init_std < math.inf, "a number that is not negative")
    check("activation_function", config.activation_function in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        token = getattr(config, name)
        in_table = _is_int(token) and _is_int(config.vocab_size) and 0 <= token < config.vocab_size
        check(name, token is None or in_table, f"null or an id from 0 to vocab_size - 1 ({config.vocab_size})")
    check(
        "quantization",
        config.quantization is None or config.quantization in QUANTIZATIONS,
        f"null or one of {', '.join(QUANTIZATIONS)}",
    )
    dtype: Any = config.dtype
    check("dtype", dtype is None or isinstance(dtype, str), "null or the name of a dtype")
    return problems + _label_problems(config)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
