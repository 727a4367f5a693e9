"""THE parameter table: which tensors an OPT model has, and what each framework calls them.

`parameter_table` derives it from a configuration. Checkpoint readers and writers, the loaders of the three backends,
the tests and a page of the documentation all read it here; nothing else in the package spells out a parameter's name.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Literal

from opt_common.config import POSITION_OFFSET, OPTConfig

Scheme = Literal["torch", "keras", "nnx"]
"""Whose leaf names and layouts: those of PyTorch, Keras or Flax, and of Hugging Face's checkpoints for each."""

Head = Literal["lm", "sequence_classification", "question_answering"]
"""What stands on a decoder; without a head it is bare, which is written None."""

ARCHITECTURES: Mapping[Head | None, str] = {
    None: "OPTModel",
    "lm": "OPTForCausalLM",
    "sequence_classification": "OPTForSequenceClassification",
    "question_answering": "OPTForQuestionAnswering",
}
"""Head -> its class, as a `config.json` names it; TensorFlow's and Flax's have a prefix."""

HEAD_MODULES: Mapping[str, Head] = {
    "lm_head": "lm",
    "score": "sequence_classification",
    "qa_outputs": "question_answering",
}
"""Module that a head's tensors are in -> the head."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """How the frameworks name one kind of tensor, and whether Keras and Flax store it transposed."""

    torch: str
    keras: str
    nnx: str
    transposed: bool = False


LEAVES = {
    "linear.weight": Leaf("weight", "kernel", "kernel", transposed=True),
    "linear.bias": Leaf("bias", "bias", "bias"),
    "embedding.weight": Leaf("weight", "embeddings", "embedding"),
    "layer_norm.weight": Leaf("weight", "gamma", "scale"),
    "layer_norm.bias": Leaf("bias", "beta", "bias"),
}
"""Leaf names by kind of tensor. The canonical name and layout of a tensor are PyTorch's."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One tensor of a model.

    Attributes:
        name: canonical name, which is Hugging Face's torch name in an `OPTForCausalLM`.
        kind: key of `LEAVES`.
        axes: one letter an axis: V vocabulary, E word_embed_proj_dim, D hidden_size, F ffn_dim, P position rows,
            C num_labels; 2 is the pair of start and end.
        shape: length of each axis, in the canonical layout.
    """

    name: str
    kind: str
    axes: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def leaf(self, scheme: Scheme) -> str:
        """The last part of the tensor's name in a framework."""
        return getattr(LEAVES[self.kind], scheme)

    def path(self, scheme: Scheme) -> tuple[str, ...]:
        """The parts of the tensor's name in a framework: ("model", "decoder", …, leaf)."""
        return (*self.name.split(".")[:-1], self.leaf(scheme))

    def transposed(self, scheme: Scheme) -> bool:
        """Whether a framework stores the transpose of the canonical layout."""
        return scheme != "torch" and LEAVES[self.kind].transposed


def module_kind(module: str) -> str:
    """The kind of a submodule, "linear", "embedding" or "layer_norm", from the last part of its name."""
    if module.startswith("embed_"):
        return "embedding"
    return "layer_norm" if module.endswith("layer_norm") else "linear"


def head_of(name: str) -> Head | None:
    """The head that a tensor with this canonical name belongs to; None for the decoder's."""
    return HEAD_MODULES.get(name.partition(".")[0])


def parameter_table(config: OPTConfig, *, head: Head | None = "lm") -> tuple[Parameter, ...]:
    """Every tensor of a model of this configuration, in the order of Hugging Face's `state_dict`.

    Args:
        config: the model's configuration.
        head: what stands on the decoder, None for nothing. A tied head of a language model is not a parameter.
    """
    return tuple(_parameters(config, head))


def count_parameters(config: OPTConfig) -> int:
    """Number of elements in all parameters of a language model of this configuration."""
    return sum(parameter.size for parameter in parameter_table(config))


def _parameters(config: OPTConfig, head: Head | None) -> Iterator[Parameter]:
    lengths = {
        "V": config.vocab_size,
        "E": config.word_embed_proj_dim,
        "D": config.hidden_size,
        "F": config.ffn_dim,
        "P": config.max_position_embeddings + POSITION_OFFSET,
        "C": config.num_labels,
        "2": 2,
    }

    def parameter(module: str, leaf: str, axes: str) -> Parameter:
        kind = f"{module_kind(module.rpartition('.')[2])}.{leaf}"
        return Parameter(f"{module}.{leaf}", kind, axes, tuple(lengths[axis] for axis in axes))

    def linear(module: str, axes: str) -> Iterator[Parameter]:
        yield parameter(module, "weight", axes)
        if config.enable_bias:
            yield parameter(module, "bias", axes[0])

    def layer_norm(module: str) -> Iterator[Parameter]:
        if config.layer_norm_elementwise_affine:
            yield parameter(module, "weight", "D")
            yield parameter(module, "bias", "D")

    yield parameter("model.decoder.embed_tokens", "weight", "VE")
    yield parameter("model.decoder.embed_positions", "weight", "PD")
    if config.has_projection:
        # Neither projection ever has a bias, whatever enable_bias says.
        yield parameter("model.decoder.project_out", "weight", "ED")
        yield parameter("model.decoder.project_in", "weight", "DE")
    if config.has_final_layer_norm:
        yield from layer_norm("model.decoder.final_layer_norm")
    for index in range(config.num_hidden_layers):
        layer = f"model.decoder.layers.{index}"
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from linear(f"{layer}.self_attn.{projection}", "DD")
        yield from layer_norm(f"{layer}.self_attn_layer_norm")
        yield from linear(f"{layer}.fc1", "FD")
        yield from linear(f"{layer}.fc2", "DF")
        yield from layer_norm(f"{layer}.final_layer_norm")
    if head == "lm" and not config.tie_word_embeddings:
        yield parameter("lm_head", "weight", "VE")
    if head == "sequence_classification":
        yield parameter("score", "weight", "CE")
    if head == "question_answering":
        # This one has a bias, whatever enable_bias says.
        yield parameter("qa_outputs", "weight", "2E")
        yield parameter("qa_outputs", "bias", "2")
