"""What a model call returns: small typed records, the same fields in all three frameworks."""

import dataclasses
from typing import Any, NoReturn, Self

from opt_common.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ModelOutput:
    """Base of the records. Fields are read by name.

    For code that knows Hugging Face's results, `transformers.Trainer` first, they are read by `["name"]` too, and by
    number among those that are not None: with labels, `[0]` is the loss. They are not unpacked: in Hugging Face's own
    that gives names.
    """

    def __getitem__(self, key: int | slice | str) -> Any:
        present = {
            field.name: value for field in dataclasses.fields(self) if (value := getattr(self, field.name)) is not None
        }
        if isinstance(key, str):
            return present[key]
        return tuple(present.values())[key]

    def __iter__(self) -> NoReturn:
        names = ", ".join(f".{field.name}" for field in dataclasses.fields(self))
        raise InputError(f"{type(self).__name__} is not unpacked; read a field by its name: {names}.")

    def __tf_flatten__(self) -> tuple[tuple[()], tuple[Any, ...]]:
        """What TensorFlow asks of a record that passes through `tf.function`."""
        return (), tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @classmethod
    def __tf_unflatten__(cls, metadata: tuple[()], components: tuple[Any, ...]) -> Self:
        return cls(**{field.name: value for field, value in zip(dataclasses.fields(cls), components, strict=True)})


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OPTModelOutput(ModelOutput):
    """Result of a bare decoder.

    Attributes:
        last_hidden_state: (B, T, E), after the final norm and `project_out`.
        past_key_values: the `KVCache` that covers past and new tokens, or None.
        hidden_states: on request, L + 1 arrays: the input of each layer (B, T, D), then `last_hidden_state`.
        attentions: on request, L arrays (B, N, T, S) of attention probabilities.
    """

    last_hidden_state: Any
    past_key_values: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OPTSequenceClassifierOutput(ModelOutput):
    """Result of a sequence classifier.

    Attributes:
        loss: scalar, at least float32, if labels were given.
        logits: (B, C), in the model's dtype, from the position that `opt_common.reference.pooled_positions` chooses.
        past_key_values: as in `OPTModelOutput`.
        hidden_states: as in `OPTModelOutput`.
        attentions: as in `OPTModelOutput`.
    """

    loss: Any = None
    logits: Any
    past_key_values: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OPTQuestionAnsweringOutput(ModelOutput):
    """Result of extractive question answering.

    Attributes:
        loss: scalar, at least float32, if positions of start and end were given.
        start_logits: (B, T), in the model's dtype: how well an answer begins there.
        end_logits: (B, T), in the model's dtype: how well an answer ends there, its last token included.
        past_key_values: as in `OPTModelOutput`.
        hidden_states: as in `OPTModelOutput`.
        attentions: as in `OPTModelOutput`.
    """

    loss: Any = None
    start_logits: Any
    end_logits: Any
    past_key_values: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OPTCausalLMOutput(ModelOutput):
    """Result of a language model.

    Attributes:
        loss: scalar, at least float32, if labels were given.
        logits: (B, T, V), in the model's dtype; None where they were not wanted, as in training with labels.
        past_key_values: as in `OPTModelOutput`.
        hidden_states: as in `OPTModelOutput`.
        attentions: as in `OPTModelOutput`.
    """

    loss: Any = None
    logits: Any = None
    past_key_values: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GenerateOutput(ModelOutput):
    """Result of `generate(..., return_dict_in_generate=True)`. R rows: each prompt's continuations follow each other.

    Attributes:
        sequences: (R, T + new) ids: the prompts as they were given, then the new tokens; those alone (R, new) where
            the prompts were embeddings without ids.
        past_key_values: the `KVCache` of everything that was read: the columns of `sequences` (behind the embeddings of
            a prompt without ids) up to the last new token, which is not read. None with beams, with `use_cache=False`
            and where a strategy's last step read other rows.
        token_logprobs: (R, new) log-probability of each new token where it was chosen, after all processors; 0 for
            padding. With beams, what each token adds to the sum that beams are ranked by.
        sequences_scores: (R,) with beams: that sum over the number of new tokens to the power of `length_penalty`.
        beam_indices: (R, new) with beams: the row of `scores` that each token was chosen from; -1 for padding.
        scores: with `output_scores`: an array (rows, V) a step: scores after the processors.
        logits: with `output_logits`: an array (rows, V) a step: scores before them.
    """

    sequences: Any
    past_key_values: Any = None
    token_logprobs: Any = None
    sequences_scores: Any = None
    beam_indices: Any = None
    scores: tuple[Any, ...] | None = None
    logits: tuple[Any, ...] | None = None
