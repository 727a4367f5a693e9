"""What is done to a step's scores before a token is chosen: which processors act, in which order, and what each does.

The functions at the end are the definition, in NumPy; the file of the same name in each backend computes the same on
its device. `processors` makes the list of a run: its order is Hugging Face's (transformers 4.57).
Edge cases, in all of them:

- A token that is ruled out has the score -inf, and keeps it.
- Where scores are equal at a cut, top-k keeps all of them, and top-p, typical-p and min-p keep as many as they need:
  top-p the higher ids, the other two the lower ones.
- A prefix counts as soon as a row is as long as it; padding is no part of a row.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from opt_common import watermark
from opt_common.errors import GenerationError, join_problems
from opt_common.generation_config import DEFAULT_TOP_K, GenerationConfig
from opt_common.strategies import SAMPLING_STRATEGIES
from opt_common.watermark import WatermarkingConfig

Array: TypeAlias = npt.NDArray[Any]

Program: TypeAlias = tuple[tuple[str, int, Callable[[Any, Any], Any] | None], ...]
"""Names of the processors in order, each with its static size and a user's function: what a compiler must know."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Processor:
    """One processor of a run.

    Attributes:
        name: the function that computes it.
        size: what shapes its program, such as the n of an n-gram; 0 where nothing does.
        function: a function of the user's, in the framework's own arrays.
        arguments: arrays that stay the same for the whole run.
        gate: from the number of tokens so far, padding included, a number that may change with each step.
    """

    name: str
    size: int = 0
    function: Callable[[Any, Any], Any] | None = None
    arguments: tuple[Array, ...] = ()
    gate: Callable[[int], float] = lambda length: 1.0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
    """What a processor's function is given beside the scores and the text.

    Attributes:
        size: see `Processor`.
        function: likewise.
        arguments: likewise.
        gate: the number of this step.
    """

    size: int
    function: Callable[[Any, Any], Any] | None
    arguments: tuple[Any, ...]
    gate: Any


def processors(
    settings: GenerationConfig,
    *,
    vocab_size: int,
    prompt_length: int,
    max_length: int,
    min_tokens_to_keep: int | None = None,
    functions: Sequence[Callable[[Any, Any], Any]] = (),
) -> tuple[Processor, ...]:
    """The processors that some settings ask for, in the order in which they act.

    Args:
        settings: how to continue.
        vocab_size: V; ids that the settings name must be below it.
        prompt_length: tokens of a prompt, padding included.
        max_length: tokens of prompt and continuation at most.
        min_tokens_to_keep: how many tokens sampling's filters leave at least; None means 1 or, with beams, one more
            than can end a text and at least 2.
        functions: the user's, which act in their order after all that is not sampling's.

    Raises:
        GenerationError: for ids that the vocabulary does not have, or a function that is none.
    """
    _check_ids(settings, vocab_size)
    _check_functions(functions)
    beams = settings.num_beams > 1
    if min_tokens_to_keep is None:
        min_tokens_to_keep = max(2, 1 + len(settings.eos_token_id)) if beams else 1
    chosen = [
        # What beams add up are log-probabilities.
        *([Processor(name="renormalize")] if beams else []),
        *_biases(settings),
        *_diversity(settings),
        *_history_penalties(settings),
        *_bad_words(settings),
        *_endings(settings, prompt_length, max_length),
        *_functions(settings, functions),
    ]
    if settings.strategy in SAMPLING_STRATEGIES:
        chosen += _warpers(settings, vocab_size, min_tokens_to_keep)
    if settings.watermarking_config is not None:
        chosen.append(_watermark(settings.watermarking_config))
    if settings.renormalize_logits:
        chosen.append(Processor(name="renormalize"))
    return tuple(chosen)


def program(chosen: Sequence[Processor]) -> Program:
    """The static part of a run's processors."""
    return tuple((processor.name, processor.size, processor.function) for processor in chosen)


def _check_functions(functions: Sequence[Callable[[Any, Any], Any]]) -> None:
    if problems := [
        f"logits_processor[{place}] is {function!r}, expected a function of input_ids and scores."
        for place, function in enumerate(functions)
        if not callable(function)
    ]:
        raise GenerationError(join_problems(problems))


def _check_ids(settings: GenerationConfig, vocab_size: int) -> None:
    bos = settings.forced_bos_token_id
    named: dict[str, Sequence[int]] = {
        "bad_words_ids": [token for word in settings.bad_words_ids for token in word],
        "sequence_bias": [token for word, _ in settings.sequence_bias for token in word],
        "forced_bos_token_id": [] if bos is None else [bos],
        "forced_eos_token_id": settings.forced_eos_token_id,
        "suppress_tokens": settings.suppress_tokens,
        "begin_suppress_tokens": settings.begin_suppress_tokens,
    }
    if problems := [
        f"{name} has the id {max(ids)}, but this model has ids from 0 to {vocab_size - 1}."
        for name, ids in named.items()
        if ids and max(ids) >= vocab_size
    ]:
        raise GenerationError(join_problems(problems))


def _biases(settings: GenerationConfig) -> list[Processor]:
    return [_sequence_bias(dict(settings.sequence_bias))] if settings.sequence_bias else []


def _diversity(settings: GenerationConfig) -> list[Processor]:
    # How often each token was chosen is added to the arguments within a step; see the backends' `selection.py`.
    apart = settings.num_beam_groups > 1
    return [Processor(name="diversity", arguments=(np.array(settings.diversity_penalty),))] if apart else []


def _bad_words(settings: GenerationConfig) -> list[Processor]:
    ends = {(token,) for token in settings.eos_token_id}
    words = {word: -math.inf for word in settings.bad_words_ids if word not in ends}
    return [_sequence_bias(words)] if words else []


def _sequence_bias(biases: Mapping[tuple[int, ...], float]) -> Processor:
    # Rounded up to powers of two with sequences that add nothing, so that other words need no other program.
    K, M = power_of_two(len(biases)), power_of_two(max(len(word) for word in biases))
    prefixes_KM = np.full((K, M), -1, dtype=np.int32)
    tokens_K = np.zeros(K, dtype=np.int32)
    biases_K = np.zeros(K, dtype=np.float64)
    for row, (word, bias) in enumerate(biases.items()):
        prefixes_KM[row, M - len(word) + 1 :] = word[:-1]
        tokens_K[row], biases_K[row] = word[-1], bias
    return Processor(name="sequence_bias", arguments=(prefixes_KM, tokens_K, biases_K))


def _history_penalties(settings: GenerationConfig) -> list[Processor]:
    chosen: list[Processor] = []
    if settings.repetition_penalty != 1:
        chosen.append(Processor(name="repetition_penalty", arguments=(np.array(settings.repetition_penalty),)))
    if settings.no_repeat_ngram_size:
        chosen.append(Processor(name="no_repeat_ngram_size", size=settings.no_repeat_ngram_size))
    return chosen


def _endings(settings: GenerationConfig, prompt_length: int, max_length: int) -> list[Processor]:
    """Processors that act at some lengths only."""
    chosen: list[Processor] = []
    ends, bos = settings.eos_token_id, settings.forced_bos_token_id
    shortest = max(settings.min_length, prompt_length + settings.min_new_tokens if settings.min_new_tokens else 0)
    if shortest and ends:
        chosen.append(_on_ids("suppress", ends, lambda length: float(length < shortest)))
    if bos is not None:
        chosen.append(_on_ids("force", (bos,), lambda length: float(length == 1)))
    if settings.forced_eos_token_id:
        chosen.append(_on_ids("force", settings.forced_eos_token_id, lambda length: float(length == max_length - 1)))
    if settings.exponential_decay_length_penalty is not None:
        start, factor = settings.exponential_decay_length_penalty

        def decay(length: int) -> float:
            # Bounded, for scores must stay finite; a factor this large decides the matter anyway.
            return math.exp(min(max(length - prompt_length - start, 0) * math.log(factor), 69.0))

        chosen.append(_on_ids("exponential_decay", ends, decay))
    if settings.suppress_tokens:
        chosen.append(_on_ids("suppress", settings.suppress_tokens, lambda length: 1.0))
    if settings.begin_suppress_tokens:
        # A forced beginning is not the first token that could be another.
        begin = prompt_length + int(prompt_length == 1 and bos is not None)
        chosen.append(_on_ids("suppress", settings.begin_suppress_tokens, lambda length: float(length == begin)))
    return chosen


def _on_ids(name: str, ids: tuple[int, ...], gate: Callable[[int], float]) -> Processor:
    padded = ids + ids[-1:] * (power_of_two(len(ids)) - len(ids))
    return Processor(name=name, arguments=(np.array(padded, dtype=np.int32),), gate=gate)


def _functions(settings: GenerationConfig, functions: Sequence[Callable[[Any, Any], Any]]) -> list[Processor]:
    """The user's own. Their `size` is their place in the list, for messages."""
    pad = np.array(settings.padding, dtype=np.int32)
    return [
        Processor(name="function", size=place, function=function, arguments=(pad,))
        for place, function in enumerate(functions)
    ]


def _watermark(config: WatermarkingConfig) -> Processor:
    arguments = (config.secret.astype(np.uint32), np.array([config.threshold], np.uint32), np.array(config.bias))
    return Processor(name=config.seeding_scheme, size=config.context_width, arguments=arguments)


def _warpers(settings: GenerationConfig, vocab_size: int, keep: int) -> list[Processor]:
    """What sampling does to scores."""
    chosen: list[Processor] = []
    if settings.temperature != 1:
        chosen.append(Processor(name="temperature", arguments=(np.array(settings.temperature),)))
    top_k = DEFAULT_TOP_K if settings.top_k is None else settings.top_k
    if 0 < top_k < vocab_size:
        best = min(max(top_k, keep), vocab_size)
        # The program sorts out a power of two; which of those is the last to keep is an argument.
        size = min(power_of_two(best), vocab_size)
        chosen.append(Processor(name="top_k", size=size, arguments=(np.array(best - 1, dtype=np.int32),)))
    if settings.top_p < 1:
        chosen.append(Processor(name="top_p", size=keep, arguments=(np.array(1 - settings.top_p),)))
    if settings.min_p is not None:
        chosen.append(Processor(name="min_p", size=keep, arguments=(np.array(settings.min_p),)))
    if settings.typical_p < 1:
        chosen.append(Processor(name="typical_p", size=keep, arguments=(np.array(settings.typical_p),)))
    for name in ("epsilon_cutoff", "eta_cutoff"):
        if 0 < getattr(settings, name) < 1:
            chosen.append(Processor(name=name, size=keep, arguments=(np.array(getattr(settings, name)),)))
    return chosen


def power_of_two(count: int) -> int:
    """The least of 4, 8, 16, … that is at least `count`."""
    return max(4, 1 << (count - 1).bit_length())


# The definition of each processor. Scores go in and new ones come out; the inputs stay as they are.


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class History:
    """The text so far.

    Attributes:
        tokens_BS: ids.
        attended_BS: which of them are text: not padding, and not beyond `length`.
        length: slots in use.
    """

    tokens_BS: Array
    attended_BS: Array
    length: int

    def last(self, count: int) -> Array:
        """The last `count` ids of each row, (B, count); -1 where there is no text."""
        positions = self.length - count + np.arange(count)
        slots = positions.clip(0)
        there = self.attended_BS[:, slots] & (positions >= 0)
        return np.where(there, self.tokens_BS[:, slots], -1)

    def seen(self, counted_BS: Array, vocab_size: int) -> Array:
        """Which tokens of the vocabulary stand in some slots, (B, V)."""
        seen_BV = np.zeros((len(self.tokens_BS), vocab_size), dtype=bool)
        rows, slots = np.nonzero(counted_BS)
        seen_BV[rows, self.tokens_BS[rows, slots]] = True
        return seen_BV


def process(
    scores_BV: Array,
    history: History,
    program: Program,
    arguments: Sequence[tuple[Array, ...]],
    gates: Sequence[float],
) -> Array:
    """Let each processor act in its turn.

    Args:
        scores_BV: logits, at least float32.
        history: the text so far.
        program: the processors.
        arguments: of each.
        gates: of each, in this step.
    """
    for (name, size, function), values, gate in zip(program, arguments, gates, strict=True):
        numbers = tuple(value.astype(scores_BV.dtype) if value.dtype.kind == "f" else value for value in values)
        setting = Setting(size=size, function=function, arguments=numbers, gate=scores_BV.dtype.type(gate))
        scores_BV = PROCESSORS[name](scores_BV, history, setting)
    return scores_BV


def sequence_bias(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Add a bias to the token that completes a sequence. -1 in a prefix stands for any token."""
    prefixes_KM, tokens_K, biases_K = setting.arguments
    last_BM = history.last(prefixes_KM.shape[1])
    fits_BK: Array = np.logical_or(prefixes_KM == -1, last_BM[:, None] == prefixes_KM).all(-1)
    bias_BV = np.zeros_like(scores_BV)
    for column, (token, bias) in enumerate(zip(tokens_K, biases_K, strict=True)):
        bias_BV[:, token] += np.where(fits_BK[:, column], bias, 0)
    return scores_BV + bias_BV


def diversity(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Make tokens that other groups of beams have chosen in this step less likely (Vijayakumar et al. 2016)."""
    del history
    penalty, chosen_BV = setting.arguments
    return scores_BV - penalty * chosen_BV


def repetition_penalty(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Make tokens that the text has less likely, each once however often it occurs."""
    (penalty,) = setting.arguments
    seen_BV = history.seen(history.attended_BS, scores_BV.shape[1])
    raised_BV: Array = scores_BV / penalty
    lowered_BV: Array = scores_BV * penalty
    penalised_BV = np.where(scores_BV < 0, lowered_BV, raised_BV)
    return np.where(seen_BV, penalised_BV, scores_BV)


def no_repeat_ngram_size(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Rule out each token that followed the last n - 1 tokens before."""
    last_BM = history.last(setting.size - 1)
    tokens_BS = np.where(history.attended_BS, history.tokens_BS, -1)
    repeated_BS = history.attended_BS
    for back in range(1, setting.size):
        before_BS = np.pad(tokens_BS, ((0, 0), (back, 0)), constant_values=-1)[:, : tokens_BS.shape[1]]
        repeated_BS = repeated_BS & (before_BS >= 0) & (before_BS == last_BM[:, -back, None])
    return rule_out(history.seen(repeated_BS, scores_BV.shape[1]), scores_BV)


def suppress(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Rule out some ids while the gate is open."""
    del history
    return rule_out(members(setting, scores_BV) & (setting.gate > 0), scores_BV)


def force(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Rule out all but some ids while the gate is open; those are equals."""
    del history
    forced_V = np.where(members(setting, scores_BV), 0, -np.inf)
    return np.where(setting.gate > 0, forced_V, scores_BV)


def exponential_decay(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Raise the scores of some ids by their magnitudes, gate - 1 times."""
    del history
    raised_BV = members(setting, scores_BV) & (scores_BV > -np.inf)
    magnitudes_BV = np.where(raised_BV, np.abs(scores_BV), 0)
    return scores_BV + magnitudes_BV * (setting.gate - 1)


def function(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Let a function of the user's act. It is given the text at the right end of (B, S) ids, pad tokens on its left."""
    assert setting.function is not None
    tokens_BS = history.last(history.length)
    given_BS = np.where(tokens_BS < 0, setting.arguments[0], tokens_BS)
    found_BV = setting.function(given_BS, scores_BV)
    check_returned(found_BV, scores_BV, setting)
    return found_BV.astype(scores_BV.dtype)


def check_returned(found_BV: Any, scores_BV: Any, setting: Setting) -> None:
    """Whether a function of the user's returned scores.

    Raises:
        GenerationError: naming what it returned, for anything but an array of the scores' class and shape.
    """
    returned = f"shape {tuple(found_BV.shape)}" if hasattr(found_BV, "shape") else type(found_BV).__name__
    shape = tuple(scores_BV.shape)
    if returned != f"shape {shape}":
        name = getattr(setting.function, "__name__", type(setting.function).__name__)
        raise GenerationError(
            f"logits_processor[{setting.size}] ({name}) returned {returned}, expected scores of shape {shape}: one for "
            "each row and token, as it was given them."
        )


def temperature(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Sharpen the distribution below 1, flatten it above."""
    del history
    return scores_BV / setting.arguments[0]


def top_k(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Keep the best tokens."""
    del history
    (last,) = setting.arguments
    best_BK = -np.sort(-scores_BV, axis=1)[:, : setting.size]
    return rule_out(scores_BV < best_BK[:, last, None], scores_BV)


def top_p(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Leave out the unlikeliest tokens, as long as together they have no more probability than allowed."""
    del history
    (removable,) = setting.arguments
    order_BV = np.argsort(scores_BV, axis=1, kind="stable")
    sorted_BV = np.take_along_axis(scores_BV, order_BV, axis=1)
    removed_BV = running_sum(softmax(sorted_BV)) <= removable
    removed_BV[:, -setting.size :] = False
    return rule_out(unsorted(removed_BV, order_BV), scores_BV)


def min_p(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Leave out tokens far less likely than the best."""
    del history
    (share,) = setting.arguments
    probabilities_BV = softmax(scores_BV)
    removed_BV = probabilities_BV < share * probabilities_BV.max(1, keepdims=True)
    order_BV = np.argsort(-scores_BV, axis=1, kind="stable")
    kept_BV: Array = np.zeros(scores_BV.shape, dtype=bool)
    kept_BV[:, : setting.size] = True
    return rule_out(removed_BV & ~unsorted(kept_BV, order_BV), scores_BV)


def typical_p(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Keep tokens whose information is nearest to the distribution's entropy (Meister et al. 2022)."""
    del history
    (mass,) = setting.arguments
    log_BV = log_softmax(scores_BV)
    distance_BV = np.abs(-log_BV - entropy(log_BV))
    order_BV = np.argsort(distance_BV, axis=1, kind="stable")
    sorted_BV = np.take_along_axis(distance_BV, order_BV, axis=1)
    total_BV = running_sum(np.take_along_axis(softmax(scores_BV), order_BV, axis=1))
    last_B = (total_BV < mass).sum(1).clip(max=scores_BV.shape[1] - 1)
    removed_BV = sorted_BV > np.take_along_axis(sorted_BV, last_B[:, None], axis=1)
    removed_BV[:, : setting.size] = False
    return rule_out(unsorted(removed_BV, order_BV), scores_BV)


def epsilon_cutoff(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Leave out unlikely tokens (Hewitt et al. 2022)."""
    del history
    (epsilon,) = setting.arguments
    removed_BV = (softmax(scores_BV) < epsilon) & below_best(scores_BV, setting.size)
    return rule_out(removed_BV, scores_BV)


def eta_cutoff(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Leave out tokens unlikely for the distribution's entropy (Hewitt et al. 2022)."""
    del history
    (epsilon,) = setting.arguments
    log_BV = log_softmax(scores_BV)
    eta_B1 = np.minimum(epsilon, np.sqrt(epsilon) * np.exp(-entropy(log_BV)))
    removed_BV = (np.exp(log_BV) < eta_B1) & below_best(scores_BV, setting.size)
    return rule_out(removed_BV, scores_BV)


def lefthash(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Favour tokens that are green after the context."""
    return favour(watermark.lefthash, scores_BV, history, setting)


def selfhash(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Favour tokens that are green together with the context."""
    return favour(watermark.selfhash, scores_BV, history, setting)


def favour(rule: Callable[..., Array], scores_BV: Array, history: History, setting: Setting) -> Array:
    """Add a bias to the tokens that are green, where the context is whole."""
    secret, threshold, bias = setting.arguments
    context_BW = history.last(setting.size)
    hashes_BV = rule(context_BW.clip(0), np.arange(scores_BV.shape[1])[None], secret)
    green_BV = (hashes_BV < threshold) & (context_BW >= 0).all(1, keepdims=True)
    return scores_BV + np.where(green_BV, bias, 0)


def renormalize(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Make scores log-probabilities."""
    del history, setting
    return log_softmax(scores_BV)


PROCESSORS = {
    "sequence_bias": sequence_bias,
    "diversity": diversity,
    "repetition_penalty": repetition_penalty,
    "no_repeat_ngram_size": no_repeat_ngram_size,
    "suppress": suppress,
    "force": force,
    "exponential_decay": exponential_decay,
    "function": function,
    "temperature": temperature,
    "top_k": top_k,
    "top_p": top_p,
    "min_p": min_p,
    "typical_p": typical_p,
    "epsilon_cutoff": epsilon_cutoff,
    "eta_cutoff": eta_cutoff,
    "lefthash": lefthash,
    "selfhash": selfhash,
    "renormalize": renormalize,
}


def choose(scores_BV: Array, uniforms_B: Array | None) -> Array:
    """The next token of each row: the likeliest, or the one whose share of the probabilities holds a number.

    Args:
        scores_BV: processed scores.
        uniforms_B: numbers from [0, 1), one a row; None takes the likeliest token, the lower id where two are equal.

    Returns:
        (B,) ids; -1 where every token is ruled out, or scores are not numbers.
    """
    tokens_B = scores_BV.argmax(1) if uniforms_B is None else sample(scores_BV, uniforms_B)
    return np.where(scores_BV.max(1) > -np.inf, tokens_B, -1)


def sample(scores_BV: Array, uniforms_B: Array) -> Array:
    """The first token up to which the probabilities, summed in the order of ids, exceed a number's share of the sum."""
    probabilities_BV = softmax(scores_BV)
    total_BV = running_sum(probabilities_BV)
    possible_BV = probabilities_BV > 0
    reached_BV = possible_BV & (total_BV > uniforms_B[:, None] * total_BV[:, -1:])
    # Rounding may leave the last sum short of a number near 1: then it is the last possible token's.
    last_B = scores_BV.shape[1] - 1 - possible_BV[:, ::-1].argmax(1)
    first_B: Array = reached_BV.argmax(1)
    return np.where(reached_BV.any(1), first_B, last_B)


def softmax(scores_BV: Array) -> Array:
    """Probabilities; all 0 where every token is ruled out."""
    weights_BV = np.exp(shifted(scores_BV))
    sums_B1 = weights_BV.sum(1, keepdims=True)
    return weights_BV / np.where(sums_B1 > 0, sums_B1, 1)


def log_softmax(scores_BV: Array) -> Array:
    """Log-probabilities; -inf throughout where every token is ruled out."""
    shifted_BV = shifted(scores_BV)
    sums_B1 = np.exp(shifted_BV).sum(1, keepdims=True)
    return shifted_BV - np.log(np.where(sums_B1 > 0, sums_B1, 1))


def shifted(scores_BV: Array) -> Array:
    """Scores below the best one, whose exponentials can't overflow."""
    best_B1 = scores_BV.max(1, keepdims=True)
    return scores_BV - np.where(best_B1 > -np.inf, best_B1, 0)


def running_sum(values_BV: Array) -> Array:
    """Cumulative sums, each rounded once: summed in float64 and brought back, so that no order of sums shows."""
    return values_BV.cumsum(1, dtype=np.float64).astype(values_BV.dtype)


def entropy(log_BV: Array) -> Array:
    """Expected information of log-probabilities, (B, 1)."""
    finite_BV = np.where(log_BV > -np.inf, log_BV, 0)
    return -(np.exp(log_BV) * finite_BV).sum(1, keepdims=True)


def below_best(scores_BV: Array, count: int) -> Array:
    """Which scores are below the `count` best, (B, V)."""
    return scores_BV < -np.sort(-scores_BV, axis=1)[:, min(count, scores_BV.shape[1]) - 1, None]


def unsorted(sorted_BV: Array, order_BV: Array) -> Array:
    """Bring flags in sorted order back into the order of ids."""
    flags_BV = np.empty_like(sorted_BV)
    np.put_along_axis(flags_BV, order_BV, sorted_BV, axis=1)
    return flags_BV


def rule_out(removed_BV: Array, scores_BV: Array) -> Array:
    """Scores, -inf where a token is removed."""
    return np.where(removed_BV, -np.inf, scores_BV)


def members(setting: Setting, scores_BV: Array) -> Array:
    """Which tokens of the vocabulary a processor is about, (V,)."""
    members_V = np.zeros(scores_BV.shape[1], dtype=bool)
    members_V[setting.arguments[0]] = True
    return members_V
