"""What is done to scores before a token is chosen, in JAX: `opt_common.processors`, on the device of the scores."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from opt_common.processors import Program, Setting, check_returned
from opt_common.watermark import INCREMENT, MASK, MULTIPLIER


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class History:
    """The text so far; see `opt_common.processors.History`."""

    tokens_BS: Array
    attended_BS: Array
    length: Array

    def of(self, rows_B: Array | np.ndarray) -> "History":
        """The texts of some rows."""
        return dataclasses.replace(self, tokens_BS=self.tokens_BS[rows_B], attended_BS=self.attended_BS[rows_B])

    def each(self, count: int) -> "History":
        """The texts up to each of the last `count` tokens, `count` rows for one, moved so that all end at `length`."""
        slots_S = jnp.arange(self.tokens_BS.shape[1])
        slots_CS = slots_S - (count - 1 - jnp.arange(count))[:, None]
        there_CS = (slots_CS >= 0) & (slots_S < self.length)
        return dataclasses.replace(
            self,
            tokens_BS=jax.lax.collapse(self.tokens_BS[:, slots_CS.clip(0)], 0, 2),
            attended_BS=jax.lax.collapse(self.attended_BS[:, slots_CS.clip(0)] & there_CS, 0, 2),
        )

    def last(self, count: int) -> Array:
        """The last `count` ids of each row, (B, count); -1 where there is no text."""
        positions = self.length - count + jnp.arange(count)
        slots = positions.clip(0)
        there = self.attended_BS[:, slots] & (positions >= 0)
        return jnp.where(there, self.tokens_BS[:, slots], -1)

    def seen(self, counted_BS: Array, vocab_size: int) -> Array:
        """Which tokens of the vocabulary stand in some slots, (B, V)."""
        seen_BV = jnp.zeros((len(counted_BS), vocab_size), dtype=bool)
        return seen_BV.at[jnp.arange(len(counted_BS))[:, None], self.tokens_BS].max(counted_BS)


def process(
    scores_BV: Array, history: History, program: Program, arguments: Sequence[tuple[Array, ...]], gates_P: Array
) -> Array:
    """Let each processor act in its turn."""
    for place, (name, size, function) in enumerate(program):
        numbers = tuple(
            value.astype(scores_BV.dtype) if jnp.issubdtype(value.dtype, jnp.floating) else value
            for value in arguments[place]
        )
        gate = gates_P[place].astype(scores_BV.dtype)
        setting = Setting(size=size, function=function, arguments=numbers, gate=gate)
        scores_BV = PROCESSORS[name](scores_BV, history, setting)
    return scores_BV


def sequence_bias(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Add a bias to the token that completes a sequence. -1 in a prefix stands for any token."""
    prefixes_KM, tokens_K, biases_K = setting.arguments
    last_BM = history.last(prefixes_KM.shape[1])
    fits_BK = ((prefixes_KM == -1) | (last_BM[:, None] == prefixes_KM)).all(-1)
    bias_BK = jnp.where(fits_BK, biases_K, 0)
    bias_BV = jnp.zeros_like(scores_BV).at[:, tokens_K].add(bias_BK)
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
    penalised_BV = jnp.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty)
    return jnp.where(seen_BV, penalised_BV, scores_BV)


def no_repeat_ngram_size(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Rule out each token that followed the last n - 1 tokens before."""
    last_BM = history.last(setting.size - 1)
    tokens_BS = jnp.where(history.attended_BS, history.tokens_BS, -1)
    repeated_BS = history.attended_BS
    for back in range(1, setting.size):
        before_BS = jnp.pad(tokens_BS, ((0, 0), (back, 0)), constant_values=-1)[:, : tokens_BS.shape[1]]
        repeated_BS = repeated_BS & (before_BS >= 0) & (before_BS == last_BM[:, -back, None])
    return rule_out(history.seen(repeated_BS, scores_BV.shape[1]), scores_BV)


def suppress(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Rule out some ids while the gate is open."""
    del history
    return rule_out(members(setting, scores_BV) & (setting.gate > 0), scores_BV)


def force(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Rule out all but some ids while the gate is open; those are equals."""
    del history
    forced_V = jnp.where(members(setting, scores_BV), 0.0, -jnp.inf).astype(scores_BV.dtype)
    return jnp.where(setting.gate > 0, forced_V, scores_BV)


def exponential_decay(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Raise the scores of some ids by their magnitudes, gate - 1 times."""
    del history
    raised_BV = members(setting, scores_BV) & (scores_BV > -jnp.inf)
    magnitudes_BV = jnp.where(raised_BV, jnp.abs(scores_BV), 0)
    return scores_BV + magnitudes_BV * (setting.gate - 1)


def function(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Let a function of the user's act. It is given the text at the right end of (B, S) ids, pad tokens on its left."""
    assert setting.function is not None
    tokens_BS = history.last(history.tokens_BS.shape[1])
    given_BS = jnp.where(tokens_BS < 0, setting.arguments[0], tokens_BS)
    found_BV = setting.function(given_BS, scores_BV)
    check_returned(found_BV, scores_BV, setting)
    return found_BV.astype(scores_BV.dtype)


def temperature(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Sharpen the distribution below 1, flatten it above."""
    del history
    return scores_BV / setting.arguments[0]


def top_k(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Keep the best tokens."""
    del history
    (last,) = setting.arguments
    best_BK = jax.lax.top_k(scores_BV, setting.size)[0]
    return rule_out(scores_BV < best_BK[:, last, None], scores_BV)


def top_p(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Leave out the unlikeliest tokens, as long as together they have no more probability than allowed."""
    del history
    (removable,) = setting.arguments
    order_BV = scores_BV.argsort(axis=1, stable=True)
    sorted_BV = jnp.take_along_axis(scores_BV, order_BV, axis=1)
    ranks_V = jnp.arange(scores_BV.shape[1])
    kept_V = ranks_V >= scores_BV.shape[1] - setting.size
    removed_BV = (running_sum(softmax(sorted_BV)) <= removable) & ~kept_V
    return rule_out(unsorted(removed_BV, order_BV), scores_BV)


def min_p(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Leave out tokens far less likely than the best."""
    del history
    (share,) = setting.arguments
    probabilities_BV = softmax(scores_BV)
    removed_BV = probabilities_BV < share * probabilities_BV.max(1, keepdims=True)
    order_BV = (-scores_BV).argsort(axis=1, stable=True)
    ranks_V = jnp.arange(scores_BV.shape[1])
    kept_BV = jnp.broadcast_to(ranks_V < setting.size, scores_BV.shape)
    return rule_out(removed_BV & ~unsorted(kept_BV, order_BV), scores_BV)


def typical_p(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Keep tokens whose information is nearest to the distribution's entropy (Meister et al. 2022)."""
    del history
    (mass,) = setting.arguments
    log_BV = log_softmax(scores_BV)
    distance_BV = jnp.abs(-log_BV - entropy(log_BV))
    order_BV = distance_BV.argsort(axis=1, stable=True)
    sorted_BV = jnp.take_along_axis(distance_BV, order_BV, axis=1)
    total_BV = running_sum(jnp.take_along_axis(softmax(scores_BV), order_BV, axis=1))
    last_B = (total_BV < mass).sum(1).clip(max=scores_BV.shape[1] - 1)
    ranks_V = jnp.arange(scores_BV.shape[1])
    removed_BV = (sorted_BV > jnp.take_along_axis(sorted_BV, last_B[:, None], axis=1)) & (ranks_V >= setting.size)
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
    eta_B1 = jnp.minimum(epsilon, jnp.sqrt(epsilon) * jnp.exp(-entropy(log_BV)))
    removed_BV = (jnp.exp(log_BV) < eta_B1) & below_best(scores_BV, setting.size)
    return rule_out(removed_BV, scores_BV)


def lefthash(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Favour tokens that are green after the context."""
    context_BW = history.last(setting.size)
    seed_B1 = setting.arguments[0].astype(jnp.uint32)
    for place in range(setting.size):
        token_B1 = context_BW[:, place : place + 1].clip(0).astype(jnp.uint32)
        seed_B1 = mixed(seed_B1 ^ token_B1)
    own_V = mixed(jnp.arange(scores_BV.shape[1], dtype=jnp.uint32))
    return favour(mixed(seed_B1 ^ own_V), scores_BV, context_BW, setting)


def selfhash(scores_BV: Array, history: History, setting: Setting) -> Array:
    """Favour tokens that are green together with the context."""
    context_BW = history.last(setting.size)
    secret = setting.arguments[0].astype(jnp.uint32)
    own_V = mixed(jnp.arange(scores_BV.shape[1], dtype=jnp.uint32))
    least_BV = jnp.full_like(own_V, np.uint32(MASK))
    for place in range(setting.size):
        token_B1 = context_BW[:, place : place + 1].clip(0).astype(jnp.uint32)
        seed_B1 = mixed(secret ^ token_B1)
        least_BV = jnp.minimum(least_BV, mixed(seed_B1 ^ own_V))
    return favour(mixed(least_BV), scores_BV, context_BW, setting)


def favour(hashes_BV: Array, scores_BV: Array, context_BW: Array, setting: Setting) -> Array:
    """Add a bias to the tokens that are green, where the context is whole."""
    _, threshold, bias = setting.arguments
    green_BV = (hashes_BV < threshold.astype(jnp.uint32)) & (context_BW >= 0).all(1, keepdims=True)
    return scores_BV + jnp.where(green_BV, bias, 0)


def mixed(bits: Array) -> Array:
    """The hash of 32-bit numbers: without 64 bits, products leave out of themselves what the mask would."""
    bits = bits + np.uint32(INCREMENT)
    for _ in range(2):
        bits = (bits ^ (bits >> 16)) * np.uint32(MULTIPLIER)
    return bits ^ (bits >> 16)


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
    """The next token of each row: the likeliest, or the one whose share of the probabilities holds a number."""
    tokens_B = likeliest(scores_BV) if uniforms_B is None else sample(scores_BV, uniforms_B)
    return jnp.where(scores_BV.max(1) > -jnp.inf, tokens_B, -1)


def likeliest(scores_BV: Array) -> Array:
    """The first of the likeliest tokens of each row."""
    # XLA's search for a place takes several times as long as those for the largest number and for the least place.
    is_best_BV = scores_BV == scores_BV.max(1, keepdims=True)
    last = scores_BV.shape[1] - 1
    return jnp.where(is_best_BV, jnp.arange(last + 1, dtype=jnp.int32), last).min(1)


def sample(scores_BV: Array, uniforms_B: Array) -> Array:
    """The first token up to which the probabilities, summed in the order of ids, exceed a number's share of the sum."""
    probabilities_BV = softmax(scores_BV)
    total_BV = running_sum(probabilities_BV)
    possible_BV = probabilities_BV > 0
    reached_BV = possible_BV & (total_BV > uniforms_B.astype(total_BV.dtype)[:, None] * total_BV[:, -1:])
    first_B = reached_BV.argmax(1)
    last_B = scores_BV.shape[1] - 1 - possible_BV[:, ::-1].argmax(1)
    return jnp.where(reached_BV.any(1), first_B, last_B)


def softmax(scores_BV: Array) -> Array:
    """Probabilities; all 0 where every token is ruled out."""
    weights_BV = jnp.exp(shifted(scores_BV))
    sums_B1 = weights_BV.sum(1, keepdims=True)
    return weights_BV / jnp.where(sums_B1 > 0, sums_B1, 1)


def log_softmax(scores_BV: Array) -> Array:
    """Log-probabilities; -inf throughout where every token is ruled out."""
    shifted_BV = shifted(scores_BV)
    sums_B1 = jnp.exp(shifted_BV).sum(1, keepdims=True)
    return shifted_BV - jnp.log(jnp.where(sums_B1 > 0, sums_B1, 1))


def shifted(scores_BV: Array) -> Array:
    """Scores below the best one, whose exponentials can't overflow."""
    best_B1 = scores_BV.max(1, keepdims=True)
    return scores_BV - jnp.where(best_B1 > -jnp.inf, best_B1, 0)


def running_sum(values_BV: Array) -> Array:
    """Cumulative sums, each rounded once, so that no order of sums shows."""
    if values_BV.dtype == jnp.float64:
        return values_BV.cumsum(1)

    # Without float64, each sum is a pair: its rounded value, and what rounding left out (Knuth's two-sum).
    def add(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        sum = left[0] + right[0]
        part = sum - left[0]
        rest = (left[0] - (sum - part)) + (right[0] - part) + left[1] + right[1]
        rounded = sum + rest
        return rounded, rest - (rounded - sum)

    return jax.lax.associative_scan(add, (values_BV, jnp.zeros_like(values_BV)), axis=1)[0]


def entropy(log_BV: Array) -> Array:
    """Expected information of log-probabilities, (B, 1)."""
    finite_BV = jnp.where(log_BV > -jnp.inf, log_BV, 0)
    return -(jnp.exp(log_BV) * finite_BV).sum(1, keepdims=True)


def below_best(scores_BV: Array, count: int) -> Array:
    """Which scores are below the `count` best, (B, V)."""
    return scores_BV < jax.lax.top_k(scores_BV, min(count, scores_BV.shape[1]))[0][:, -1:]


def unsorted(sorted_BV: Array, order_BV: Array) -> Array:
    """Bring flags in sorted order back into the order of ids."""
    return jnp.zeros_like(sorted_BV).at[jnp.arange(len(sorted_BV))[:, None], order_BV].set(sorted_BV)


def rule_out(removed_BV: Array, scores_BV: Array) -> Array:
    """Scores, -inf where a token is removed."""
    return jnp.where(removed_BV, -jnp.inf, scores_BV)


def members(setting: Setting, scores_BV: Array) -> Array:
    """Which tokens of the vocabulary a processor is about, (V,)."""
    members_V = jnp.zeros(scores_BV.shape[1], dtype=bool)
    return members_V.at[setting.arguments[0]].set(True)
