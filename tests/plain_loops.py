"""What a strategy means: text by the NumPy reference alone, one row at a time, all of it read anew for each token."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from opt_common.assisted import checked
from opt_common.config import OPTConfig
from opt_common.contrastive import preferred
from opt_common.dola import candidate_layers, contrasted, early_logits
from opt_common.guidance import guided
from opt_common.processors import History, choose, log_softmax, process, processors, program, softmax
from opt_common.reference import ReferenceOutput, forward

Array = np.ndarray
Forward = Callable[[Sequence[int]], ReferenceOutput]


def reader(config: OPTConfig, params: Mapping[str, Array]) -> Forward:
    """What the reference computes for one text."""
    return lambda ids: forward(config, params, np.array([list(ids)]))


def processed(config: OPTConfig, settings: Any, ids: Sequence[int], prompt: int, logits_V: Array) -> Array:
    """Scores of the next token, (1, V), after the processors that some settings ask for."""
    found = processors(settings, vocab_size=config.vocab_size, prompt_length=prompt, max_length=10**6)
    tokens_BS = np.array([list(ids)])
    history = History(tokens_BS=tokens_BS, attended_BS=np.ones_like(tokens_BS) > 0, length=len(ids))
    gates = [processor.gate(len(ids)) for processor in found]
    arguments = [processor.arguments for processor in found]
    return process(logits_V[None], history, program(found), arguments, gates)


def contrastive(config: OPTConfig, read: Forward, prompt: Sequence[int], settings: Any) -> Iterator[tuple[int, Array]]:
    """Contrastive search: each new token, and the scores (V,) that its candidates were the best of."""
    ids = list(prompt)
    while True:
        scores_BV = processed(config, settings, ids, len(prompt), read(ids).logits[0, -1])
        logprobs_BV = log_softmax(scores_BV)
        tokens = np.argsort(-logprobs_BV[0], kind="stable")[: settings.top_k]
        states = [read([*ids, token]).last_hidden_state[0] for token in tokens]
        place = preferred(
            np.stack([state[:-1] for state in states]),
            np.ones((len(tokens), len(ids)), bool),
            np.stack([state[-1] for state in states]),
            logprobs_BV[:, tokens],
            settings.penalty_alpha,
        )
        ids.append(int(tokens[place[0]]))
        yield ids[-1], scores_BV[0]


def dola(
    config: OPTConfig, params: Mapping[str, Array], prompt: Sequence[int], settings: Any
) -> Iterator[tuple[int, Array]]:
    """DoLa: each new token, and the scores (V,) that it was the best of."""
    read, ids = reader(config, params), list(prompt)
    layers = candidate_layers(config, settings.dola_layers)
    while True:
        output = read(ids)
        early = [early_logits(config, params, output.hidden_states[layer][:, -1]) for layer in layers]
        contrast_BV = contrasted(output.logits[:, -1], np.stack(early, axis=1))
        scores_BV = processed(config, settings, ids, len(prompt), contrast_BV[0])
        ids.append(int(scores_BV[0].argmax()))
        yield ids[-1], scores_BV[0]


def guidance(
    config: OPTConfig, read: Forward, prompt: Sequence[int], negative: Sequence[int], settings: Any
) -> Iterator[tuple[int, Array]]:
    """Guidance: each new token, and the scores (V,) that it was the best of."""
    ids, second = list(prompt), list(negative)
    while True:
        guided_BV = guided(read(ids).logits[:, -1], read(second).logits[:, -1], settings.guidance_scale)
        scores_BV = processed(config, settings, ids, len(prompt), guided_BV[0])
        ids.append(int(scores_BV[0].argmax()))
        second.append(ids[-1])
        yield ids[-1], scores_BV[0]


def assisted(
    config: OPTConfig, read: Forward, guess: Forward, prompt: Sequence[int], settings: Any, uniforms: Array
) -> Iterator[tuple[int, bool]]:
    """Drawn text with guesses of another model: each new token, and whether it was guessed.

    `uniforms` has three numbers for each new token: for the token, for the guess, and for whether the guess holds.
    """
    ids, start = list(prompt), len(prompt)

    def scores(reader: Forward, more: Sequence[int] = ()) -> Array:
        text = [*ids, *more]
        return processed(config, settings, text, start, reader(text).logits[0, -1])

    ids.append(int(choose(scores(read), uniforms[:1, 0])[0]))
    yield ids[-1], False
    while True:
        guesses, shares = [], []
        for _ in range(settings.num_assistant_tokens):
            own_BV = scores(guess, guesses)
            numbers = uniforms[len(ids) - start + len(guesses)]
            guesses.append(int(choose(own_BV, numbers[1:2])[0]))
            shares.append(softmax(own_BV))
        for guessed, shares_BV in zip([*guesses, -1], [*shares, shares[-1]], strict=True):
            token, _, chance = uniforms[len(ids) - start, :, None]
            found = checked(scores(read), shares_BV, np.array([guessed]), token, chance)
            ids.append(int(found[0]))
            yield ids[-1], guessed == ids[-1]
            if guessed != ids[-1]:
                break
