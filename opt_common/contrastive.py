"""Contrastive search: likely tokens, but not those that the model takes for what it has read already.

The rule is that of Su et al. 2022, "A Contrastive Framework for Neural Text Generation", as Hugging Face has it
(transformers 4.55, the last version with it). In each step the `top_k` likeliest tokens are read, each behind a copy of
the text, and the one with the greatest

    (1 - penalty_alpha) * probability - penalty_alpha * penalty

is taken: the penalty is the greatest cosine similarity between the candidate's last hidden state and those of the
tokens before it, padding left out. Of equals the likelier candidate is taken. A token that processors have ruled out is
no candidate, however few are left; Hugging Face may take it.

The step that reads the candidates also selects those that follow the one it takes, so that a token costs one step.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from opt_common.decoding import Arrays, Choice, Prompt, Reader, Selection, Text, check_possible, details_of
from opt_common.generation_config import DEFAULT_TOP_K, GenerationConfig

Array = npt.NDArray[Any]


def contrastive_search(reader: Reader, prompt: Prompt, settings: GenerationConfig) -> Iterator[Arrays]:
    """Continue each row by itself, token by token; see the module's docstring.

    Rows end as in `opt_common.decoding.decode_tokens`.

    Yields:
        Each step's "tokens", (B,), and its details.

    Raises:
        GenerationError: where a row that is not finished has no candidate.
    """
    text = Text(prompt)
    details = details_of(settings)
    rows_B = np.arange(len(prompt.input_ids))
    finished_B = np.zeros(len(rows_B), dtype=bool)
    width = DEFAULT_TOP_K if settings.top_k is None else settings.top_k
    alpha = np.array(settings.penalty_alpha)
    found = reader.start(Choice(gates_P=prompt.gates(0), selection=Selection("candidates", width, details)))
    parents_B = rows_B
    for step in range(prompt.new_tokens):
        tokens_BK, logprobs_BK = found["tokens"], found["logprobs"]
        check_possible(~(logprobs_BK.max(1) > -np.inf), finished_B, step)
        K = tokens_BK.shape[1]
        choice = Choice(
            gates_P=prompt.gates(step + 1),
            selection=Selection("contrast", K, details),
            arguments=(logprobs_BK, alpha),
            rows_B=np.repeat(parents_B, K),
        )
        asked = {name: found[name] for name in ("scores", "logits") if name in details}
        found = reader.read(tokens_BK.reshape(-1, 1), choice)
        places_B = found["places"]
        chosen: Arrays = {**asked, "tokens": np.where(finished_B, settings.padding, tokens_BK[rows_B, places_B])}
        if "logprobs" in details:
            chosen = {**chosen, "logprobs": np.where(finished_B, 0, logprobs_BK[rows_B, places_B])}
        yield chosen
        parents_B = rows_B * K + places_B
        finished_B |= text.ended(chosen["tokens"])
        if finished_B.all():
            return


def preferred(states_RSE: Array, context_RS: Array, new_RE: Array, logprobs_BK: Array, alpha: Array) -> Array:
    """The candidate to take for each text: what the function of this name in each backend computes on its device.

    Args:
        states_RSE: the last hidden states of what each row has read; R = B * K rows, the candidates of one text
            following each other.
        context_RS: which of them are tokens before the candidate, padding left out.
        new_RE: the last hidden state of each candidate.
        logprobs_BK: log-probabilities of the candidates; -inf for what is none.
        alpha: the weight of the penalty.

    Returns:
        (B,) numbers from 0 to K - 1; of equals the lower one.
    """
    similarity_RS = (directions(states_RSE) * directions(new_RE)[:, None]).sum(-1)
    penalty_R = np.where(context_RS, similarity_RS, -np.inf).max(1)
    value_BK = (1 - alpha) * np.exp(logprobs_BK) - alpha * penalty_R.reshape(logprobs_BK.shape)
    return np.where((logprobs_BK > -np.inf) & ~np.isnan(value_BK), value_BK, -np.inf).argmax(1)


def directions(vectors: Array) -> Array:
    """Vectors (…, E) of length 1; those of length 0 stay as they are."""
    lengths = np.sqrt((vectors * vectors).sum(-1, keepdims=True))
    return vectors / np.where(lengths > 0, lengths, 1)
