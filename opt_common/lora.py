"""LoRA: which layers of a model get an adapter, how strong it is, and what PEFT's adapter files call its tensors.

An adapted linear layer computes `base(x) + scaling * B(A(dropout(x)))`, where A is (r, in) and B is (out, r)
(Hu et al. 2021, section 4.1). Only A and B train, and what a configuration names besides. The rules and names are those
of PEFT's `LoraConfig` and of its `adapter_config.json`, for the linear layers of OPT; what this package doesn't support
of them is refused by name.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

from opt_common.config import OPTConfig
from opt_common.errors import CheckpointError, ConfigError, join_problems
from opt_common.json_file import UnreadableError, read_json
from opt_common.params import Head, Parameter, head_of, parameter_table

ADAPTER_CONFIG_FILE = "adapter_config.json"
STORED_PREFIX = "base_model.model."
"""What PEFT puts before the name of every tensor in an adapter's file."""

DEFAULT_TARGETS = ("q_proj", "v_proj")
"""The layers that PEFT adapts in an OPT model when none are named; the paper's choice too."""

ALL_LINEAR = "all-linear"
BIASES = ("none", "all", "lora_only")
INITIALISATIONS = (True, False, "gaussian")
TASK_TYPES: Mapping[Head | None, str] = {
    None: "FEATURE_EXTRACTION",
    "lm": "CAUSAL_LM",
    "sequence_classification": "SEQ_CLS",
    "question_answering": "QUESTION_ANS",
}
"""Head -> PEFT's name of what it is for."""

_TASK_MODULES: Mapping[str, tuple[str, ...]] = {"SEQ_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Modules that PEFT saves for a task without being told. `classifier` is another architecture's name of a head."""

_IGNORED = frozenset(
    "peft_type peft_version auto_mapping inference_mode megatron_core qalora_group_size runtime_config "
    "ensure_weight_tying".split()
)
"""Keys of an `adapter_config.json` that say nothing about what an adapter of an OPT model computes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What PEFT's `LoraConfig` says; fields that are not here are refused when a file sets them.

    Attributes:
        r: rank, 1 or more.
        lora_alpha: strength: see `scaling_of`.
        target_modules: linear layers that get an adapter: names (`"q_proj"`, or longer ones that end so), a regular
            expression for whole names, or "all-linear" for every one but the head. None means `DEFAULT_TARGETS`.
        exclude_modules: layers that get none although they are targets: names or a regular expression.
        lora_dropout: probability with which, in training, an input of A is dropped.
        bias: which biases train and are stored: "none", "all", or those of adapted layers, "lora_only".
        use_rslora: whether the strength is divided by the root of the rank (Kalajdzievski 2023).
        modules_to_save: other modules that train whole and are stored whole, by the end of their names. The head of a
            classifier or of question answering is one of them unless `task_type` says otherwise.
        init_lora_weights: how A starts: True uniform within ±1/sqrt(in), "gaussian" normal of deviation 1/r; B starts
            with zeros. False starts both uniform: the model's outputs change at once.
        layers_to_transform: numbers of the decoder layers that get adapters; None for all.
        layers_pattern: name of the list of layers; "layers" in OPT.
        rank_pattern: layers' names or regular expressions -> their rank, in place of `r`.
        alpha_pattern: likewise, in place of `lora_alpha`.
        task_type: one of `TASK_TYPES`; None means that of the model's head.
        base_model_name_or_path: where the base model came from, for people and for PEFT.
        revision: its revision.

    Raises:
        ConfigError: for values that make no sense, all of them at once.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: Sequence[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int], hash=False)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float], hash=False)
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        layers = (self.layers_to_transform,) if isinstance(self.layers_to_transform, int) else self.layers_to_transform
        object.__setattr__(self, "layers_to_transform", None if layers is None else tuple(layers))
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, dict(getattr(self, name) or {}))
        if problems := list(_problems(self)):
            raise ConfigError(join_problems(problems))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read the contents of an `adapter_config.json`.

        Raises:
            ConfigError: for an adapter of another method than LoRA, values that make no sense, and settings that this
                package doesn't support, by name.
        """
        if values.get("peft_type", "LORA") != "LORA":
            raise ConfigError(f"peft_type is {values['peft_type']!r}, expected 'LORA', the one method supported here.")
        known = {field.name for field in dataclasses.fields(cls)}
        # Off is spelled in several ways; what is off needs no support.
        foreign = [name for name, value in values.items() if name not in known | _IGNORED and value not in _OFF]
        if foreign:
            raise ConfigError(
                f"The adapter uses {', '.join(sorted(foreign))}, which is not supported here. Merge it into its base "
                "model with PEFT (merge_and_unload), and load the result."
            )
        if values.get("ensure_weight_tying") and values.get("modules_to_save"):
            raise ConfigError("The adapter uses ensure_weight_tying, which is not supported here. Merge it with PEFT.")
        return cls(**{name: value for name, value in values.items() if name in known and value is not None})

    @classmethod
    def from_json_file(cls, path: Path) -> Self:
        """Read an `adapter_config.json`.

        Raises:
            ConfigError: if it is absent, no JSON object, or as for `from_dict`.
        """
        try:
            values: Any = read_json(path)
        except FileNotFoundError:
            raise ConfigError(f"There is no {path}. Name a directory that an adapter was saved to.") from None
        except UnreadableError as error:
            raise ConfigError(f"{path} is not valid JSON ({error}). Fetch it again.") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path} is not a JSON object. Fetch it again.")
        try:
            return cls.from_dict(cast("dict[str, Any]", values))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_json(self) -> str:
        """The contents of an `adapter_config.json`, which PEFT reads."""
        values = dataclasses.asdict(self)
        if self.exclude_modules is None:
            del values["exclude_modules"]  # PEFT before 0.14 doesn't know the key
        fixed = {"peft_type": "LORA", "auto_mapping": None, "inference_mode": True, "fan_in_fan_out": False}
        return json.dumps({**values, **fixed}, indent=2, sort_keys=True) + "\n"

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


_OFF: tuple[Any, ...] = (None, False, [], {}, "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptedLayer:
    """One linear layer that has an adapter.

    Attributes:
        weight: its row of the parameter table.
        r: the adapter's rank.
        scaling: what the adapter's output is multiplied with.
    """

    weight: Parameter
    r: int
    scaling: float

    @property
    def module(self) -> str:
        """Canonical name of the layer."""
        return self.weight.name.removesuffix(".weight")

    @property
    def matrices(self) -> tuple[Parameter, Parameter]:
        """A and B, as rows of a parameter table: each is a linear layer without bias inside the adapted layer."""
        (out_axis, in_axis), (out_features, in_features) = self.weight.axes, self.weight.shape
        a = Parameter(f"{self.module}.lora_A.weight", "linear.weight", f"R{in_axis}", (self.r, in_features))
        b = Parameter(f"{self.module}.lora_B.weight", "linear.weight", f"{out_axis}R", (out_features, self.r))
        return a, b


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterTable:
    """Everything that an adapter consists of, for one model.

    Attributes:
        layers: the adapted layers, in the order of the parameter table.
        others: parameters of the model that train and are stored with the adapter: biases, and modules to save.
        head: the model's head.
    """

    layers: tuple[AdaptedLayer, ...]
    others: tuple[Parameter, ...]
    head: Head | None

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Every tensor that trains and is stored."""
        return (*(matrix for layer in self.layers for matrix in layer.matrices), *self.others)

    def stored_name(self, parameter: Parameter) -> str:
        """What PEFT's files call a tensor."""
        *path, leaf = module_name(parameter.name, self.head).split(".")
        if leaf == "bias" and parameter.name.removesuffix(".bias") in {layer.module for layer in self.layers}:
            path.append("base_layer")
        return STORED_PREFIX + ".".join((*path, leaf))


def scaling_of(lora: LoraConfig, alpha: float, r: int) -> float:
    """What B(A(x)) is multiplied with: alpha / r, or alpha / sqrt(r) with `use_rslora`."""
    return alpha / math.sqrt(r) if lora.use_rslora else alpha / r


def adapter_bound(features: int) -> float:
    """Greatest magnitude of a new, uniform A or B with so many inputs: how PyTorch starts a linear layer."""
    return 1 / math.sqrt(features)


def resolve_lora(config: OPTConfig, lora: LoraConfig, head: Head | None) -> LoraConfig:
    """A configuration in which nothing is left to the model: target modules, task and modules to save are said.

    Raises:
        ConfigError: for target modules or modules to save that a model of this configuration and head has not.
    """
    modules = [module_name(row.name.removesuffix(".weight"), head) for row in _linear(config, head)]
    targets = DEFAULT_TARGETS if lora.target_modules is None else lora.target_modules
    if targets == ALL_LINEAR:
        decoder = [module for module in modules if head_of(module) is None]
        targets = tuple(sorted({module.rpartition(".")[2] for module in decoder}))
    task = lora.task_type or TASK_TYPES[head]
    named = lora.modules_to_save or ()
    implied = tuple(name for name in _TASK_MODULES.get(task, ()) if name not in named and _exists(config, head, name))
    resolved = lora.replace(target_modules=targets, task_type=task, modules_to_save=(*named, *implied) or None)
    if not isinstance(targets, str):
        unknown = [name for name in targets if not any(_ends(module, name) for module in modules)]
        if unknown:
            raise ConfigError(
                f"target_modules has {', '.join(unknown)}, which this model has no linear layer of. It has "
                f"{', '.join(sorted({module.rpartition('.')[2] for module in modules}))}; what is none (an embedding, "
                "a norm) or a head that is the token table can't have an adapter."
            )
    adapter_table(config, resolved, head)
    return resolved


def adapter_table(config: OPTConfig, lora: LoraConfig, head: Head | None) -> AdapterTable:
    """What an adapter of this configuration consists of in a model of this configuration and head.

    Raises:
        ConfigError: if it would adapt nothing, or save a module that the model has not, or the model is in few bits.
    """
    if config.quantization is not None:
        raise ConfigError(
            f"The model's weights are in few bits ({config.quantization}), which take no adapter. Load it without "
            "quantization; for training in little memory, PyTorch has opt_torch.bits_and_bytes."
        )
    saved = {
        parameter.name
        for parameter in parameter_table(config, head=head)
        if any(_is_saved(parameter, name, head) for name in lora.modules_to_save or ())
    }
    _check_saved(config, lora, head)
    layers = tuple(
        AdaptedLayer(weight=weight, r=r, scaling=scaling_of(lora, alpha, r))
        for weight in _linear(config, head)
        if weight.name not in saved
        for module in [module_name(weight.name.removesuffix(".weight"), head)]
        if _is_target(lora, module)
        for r in [_by_pattern(lora.rank_pattern, module, lora.r)]
        for alpha in [_by_pattern(lora.alpha_pattern, module, lora.lora_alpha)]
    )
    if not layers:
        raise ConfigError(f"target_modules {lora.target_modules!r} leaves no linear layer of this model to adapt.")
    adapted = {layer.module for layer in layers}
    others = tuple(
        parameter
        for parameter in parameter_table(config, head=head)
        if parameter.name in saved or _bias_trains(parameter, lora, adapted)
    )
    return AdapterTable(layers=layers, others=others, head=head)


def module_name(name: str, head: Head | None) -> str:
    """A canonical name as a model with this head calls it: without a head there is no outer `model`."""
    return name.removeprefix("model.") if head is None else name


def check_no_adapter(lora: LoraConfig | None) -> None:
    """Refuse a second adapter.

    Raises:
        ConfigError: if there is one.
    """
    if lora is not None:
        raise ConfigError("The model has an adapter, and it can have one. Call merge_and_unload() first.")


def check_adapter(lora: LoraConfig | None) -> LoraConfig:
    """The adapter's configuration.

    Raises:
        ConfigError: if the model has none.
    """
    if lora is None:
        raise ConfigError("The model has no adapter. Call add_lora or load_adapter first.")
    return lora


def check_whole(lora: LoraConfig | None, *, merged: bool) -> None:
    """Refuse to write a model's checkpoint without what its adapter has learnt.

    Raises:
        CheckpointError: if the model has an adapter that isn't merged.
    """
    if lora is not None and not merged:
        raise CheckpointError(
            "The model has an adapter, which save_pretrained does not write. Use save_adapter for the adapter, or "
            "merge_adapter() first for a model with the adapter in its weights."
        )


def _names(name: str, value: Any) -> tuple[str, ...] | str | None:
    if value is None or isinstance(value, str):
        return value
    names = tuple(cast("Iterable[object]", value)) if isinstance(value, list | tuple | set | frozenset) else (value,)
    if not all(isinstance(item, str) for item in names):
        raise ConfigError(f"{name} is {value!r}, expected names.")
    ordered = sorted(cast("tuple[str, ...]", names)) if isinstance(value, set | frozenset) else names
    return tuple(cast("Iterable[str]", ordered)) or None


def _problems(lora: LoraConfig) -> Iterator[str]:
    values: Mapping[str, tuple[object, bool, str]] = {
        "lora_dropout": (
            lora.lora_dropout,
            _is_number(lora.lora_dropout) and 0 <= lora.lora_dropout < 1,
            "0 to below 1",
        ),
        "bias": (lora.bias, lora.bias in BIASES, f"one of {', '.join(BIASES)}"),
        "init_lora_weights": (
            lora.init_lora_weights,
            lora.init_lora_weights in INITIALISATIONS,
            "a bool or 'gaussian'",
        ),
        "task_type": (
            lora.task_type,
            lora.task_type in (None, *TASK_TYPES.values()),
            f"one of {', '.join(TASK_TYPES.values())}",
        ),
        "layers_to_transform": (
            lora.layers_to_transform,
            all(map(_is_count, cast("tuple[object, ...]", lora.layers_to_transform or ()))),
            "numbers of layers",
        ),
    }
    values = {
        **values,
        **{
            f"rank of {name}": (r, _is_count(r) and r > 0, "1 or more")
            for name, r in _with(lora.rank_pattern, "r", lora.r)
        },
        **{
            f"alpha of {name}": (alpha, _is_number(alpha), "a number")
            for name, alpha in _with(lora.alpha_pattern, "lora_alpha", lora.lora_alpha)
        },
    }
    yield from (f"{name} is {value!r}, expected {what}." for name, (value, holds, what) in values.items() if not holds)
    if isinstance(lora.target_modules, str) and lora.layers_to_transform is not None:
        yield "layers_to_transform goes with names in target_modules; a regular expression can say the layers itself."
    if lora.layers_pattern and lora.layers_to_transform is None:
        yield "layers_pattern says where the numbers of layers_to_transform are, which is None."
    for pattern in (*_patterns(lora), *lora.rank_pattern, *lora.alpha_pattern):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            yield f"{pattern!r} is no regular expression ({error})."


def _with(pattern: Mapping[str, Any], name: str, value: Any) -> list[tuple[str, Any]]:
    return [(name, value), *pattern.items()]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _patterns(lora: LoraConfig) -> Iterator[str]:
    for value in (lora.target_modules, lora.exclude_modules):
        if isinstance(value, str):
            yield value
    yield from (lora.layers_pattern,) if isinstance(lora.layers_pattern, str) else lora.layers_pattern or ()


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _linear(config: OPTConfig, head: Head | None) -> list[Parameter]:
    """The weights of all linear layers."""
    return [parameter for parameter in parameter_table(config, head=head) if parameter.kind == "linear.weight"]


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _is_target(lora: LoraConfig, module: str) -> bool:
    """PEFT's rule. A layer that is named in full is a target whatever `layers_to_transform` says."""
    excluded, targets = lora.exclude_modules, lora.target_modules
    assert targets is not None
    if isinstance(excluded, str):
        if re.fullmatch(excluded, module):
            return False
    elif any(_ends(module, name) for name in excluded or ()):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    if module in targets:
        return True
    return any(_ends(module, name) for name in targets) and _in_layers(lora, module)


def _in_layers(lora: LoraConfig, module: str) -> bool:
    layers = cast("tuple[int, ...] | None", lora.layers_to_transform)
    if not layers:
        return True
    patterns = (lora.layers_pattern,) if isinstance(lora.layers_pattern, str) else lora.layers_pattern or (r"[^.]*",)
    for pattern in patterns:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\.", module):
            return int(match["layer"]) in layers
    return False


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that a layer's name ends with."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _is_saved(parameter: Parameter, name: str, head: Head | None) -> bool:
    return module_name(parameter.name, head).rpartition(".")[0].endswith(name)


def _exists(config: OPTConfig, head: Head | None, name: str) -> bool:
    return any(_is_saved(parameter, name, head) for parameter in parameter_table(config, head=head))


def _check_saved(config: OPTConfig, lora: LoraConfig, head: Head | None) -> None:
    usual = {name for names in _TASK_MODULES.values() for name in names}
    for name in lora.modules_to_save or ():
        if head == "lm" and config.tie_word_embeddings and ("embed_tokens".endswith(name) or "lm_head".endswith(name)):
            raise ConfigError(
                f"modules_to_save has {name}, but token table and head are one tensor here, and PEFT would train a "
                'copy of it. Save the model with "tie_word_embeddings": false first, or leave it out.'
            )
        if name not in usual and not _exists(config, head, name):
            raise ConfigError(f"modules_to_save has {name}, which is no layer with weights in this model.")


def _bias_trains(parameter: Parameter, lora: LoraConfig, adapted: set[str]) -> bool:
    module, _, leaf = parameter.name.rpartition(".")
    return leaf == "bias" and (lora.bias == "all" or (lora.bias == "lora_only" and module in adapted))
