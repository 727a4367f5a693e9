"""What is done to scores before a token is chosen, in TensorFlow: `opt_common.processors`, on the scores' device."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from opt_common.processors import Program, Setting, check_returned
from opt_common.watermark import INCREMENT, MASK, MULTIPLIER


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class History:
    """The text so far; see `opt_common.processors.History`."""

    tokens_BS: tf.Tensor
    attended_BS: tf.Tensor
    length: tf.Tensor

    def of(self, rows_B: tf.Tensor | np.ndarray) -> "History":
        """The texts of some rows."""
        return dataclasses.replace(
            self, tokens_BS=tf.gather(self.tokens_BS, rows_B), attended_BS=tf.gather(self.attended_BS, rows_B)
        )

    def each(self, count: int) -> "History":
        """The texts up to each of the last `count` tokens, `count` rows for one, moved so that all end at `length`."""
        slots_S = tf.range(vocab_size(self.tokens_BS))
        slots_CS = slots_S - (count - 1 - tf.range(count))[:, None]
        there_CS = (slots_CS >= 0) & (slots_S < self.length)
        return dataclasses.replace(
            self,
            tokens_BS=tf.reshape(
                tf.gather(self.tokens_BS, tf.maximum(slots_CS, 0), axis=1), (-1, vocab_size(self.tokens_BS))
            ),
            attended_BS=tf.reshape(
                tf.gather(self.attended_BS, tf.maximum(slots_CS, 0), axis=1) & there_CS,
                (-1, vocab_size(self.tokens_BS)),
            ),
        )

    def last(self, count: int) -> tf.Tensor:
        """The last `count` ids of each row, (B, count); -1 where there is no text."""
        positions = self.length - count + tf.range(count)
        slots = tf.maximum(positions, 0)
        there = tf.gather(self.attended_BS, slots, axis=1) & (positions >= 0)
        return tf.where(there, tf.gather(self.tokens_BS, slots, axis=1), -1)

    def seen(self, counted_BS: tf.Tensor, vocab_size: int) -> tf.Tensor:
        """Which tokens of the vocabulary stand in some slots, (B, V)."""
        B, S = counted_BS.shape
        rows_BS = tf.broadcast_to(tf.range(B)[:, None], (B, S))
        counts_BV = tf.zeros((B, vocab_size), tf.int32)
        places_BS2 = tf.stack((rows_BS, self.tokens_BS), axis=-1)
        return tf.tensor_scatter_nd_add(counts_BV, places_BS2, tf.cast(counted_BS, tf.int32)) > 0


def process(
    scores_BV: tf.Tensor,
    history: History,
    program: Program,
    arguments: Sequence[tuple[tf.Tensor, ...]],
    gates_P: tf.Tensor,
) -> tf.Tensor:
    """Let each processor act in its turn."""
    for place, (name, size, function) in enumerate(program):
        numbers = tuple(
            tf.cast(value, scores_BV.dtype) if value.dtype.is_floating else value for value in arguments[place]
        )
        gate = tf.cast(gates_P[place], scores_BV.dtype)
        setting = Setting(size=size, function=function, arguments=numbers, gate=gate)
        scores_BV = PROCESSORS[name](scores_BV, history, setting)
    return scores_BV


def sequence_bias(scores_BV: tf.Tensor, history: History, setting: Setting) -> tf.Tensor:
    """Add a bias to the token that completes a sequence. -1 in a prefix stands for any token."""
    prefixes_KM, tokens_K, biases_K = setting.arguments
    last_BM = history.last(prefixes_KM.shape[1])
    fits_BK = tf.reduce_all((prefixes_KM == -1) | (last_BM[:, None] == prefixes_KM), axis=-1)
    bias_BK = tf.where(fits_BK, biases_K, tf.zeros_like(biases_K))
    bias_BV = tf.transpose(
        tf.tensor_scatter_nd_add(tf.zeros_like(tf.transpose(scores_BV)), tokens_K[:, None], tf.transpose(bias_BK))
    )
    return scores_BV + bias_BV


def diversity(scores_BV: tf.Tensor, history: History, setting: Setting) -> tf.Tensor:
    """Make tokens that other groups of beams have chosen in this step less likely (Vijayakumar et al. 2016)."""
    del history
    penalty, chosen_BV = setting.arguments
    return scores_BV - penalty * chosen_BV


def repetition_penalty(scores_BV: tf.Tensor, history: History, setting: Setting) -> tf.Tensor:
    """Make tokens that the text has less likely, each once however often it occurs."""
    (penalty,) = setting.arguments
    seen_BV = history.seen(history.attended_BS, vocab_size(scores_BV))
    penalised_BV = tf.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty)
    return tf.where(seen_BV, penalised_BV, scores_BV)


def no_repeat_ngram_size(scores_BV: tf.Tensor, history: History, setting: Setting) -> tf.Tensor:
    """Rule out each token that followed the last n - 1 tokens before."""
    last_BM = history.last(setting.size - 1)
    tokens_BS = tf.where(history.attended_BS, history.tokens_BS, -1)
    repeated_BS = history.attended_BS
    for back in range(1, setting.size):
        before_BS = tf.pad(tokens_BS, ((0, 0), (back, 0)), constant_values=-1)[:, : tokens_BS.shape[1]]
        repeated_BS = repeated_BS & (before_BS >= 0) & (before_BS == last_BM[:, -back, None])
    return rule_out(history.seen(repeated_BS, vocab_size(scores_BV)), scores_BV)


def suppress(scores_BV: tf.Tensor, history: History, setting: Setting) -> tf.Tensor:
    """Rule out some ids while the gate is open."""
    del history
    return rule_out(members(setting, scores_BV) & (setting.gate > 0), scores_BV)


def force(scores_BV: tf.Tensor, history: History, setting: Setting) -> tf.Tensor:
    """Rule out all but some ids while the gate is open; those are equals."""
    del history
    forced_V = tf.cast(tf.where(members(setting, scores_BV), 0.0, -np.inf), scores_BV.dtype)
    return tf.where(setting.gate > 0, forced_V, scores_BV)


def exponential_decay(scores_BV: tf.Tensor, history: History, setting: Setting) -> tf.Tensor:
    """Raise the scores of some ids by their magnitudes, gate - 1 times."""
    del history
    raised_BV = members(setting, scores_BV) & (scores_BV > -np.inf)
    magnitudes_BV = tf.where(raised_BV, tf.abs(scores_BV), tf.zeros_like(scores_BV))
    return scores_BV + magnitudes_BV * (setting.gate - 1)


def function(scores_BV: tf.Tensor, history: History, setting: Setting) -> tf.Tensor:
    """Let a function of the user's act. It is given the text at the right end of (B, S) ids, pad tokens on its left."""
    assert setting.function is not None
    tokens_BS = history.last(history.tokens_BS.shape[1])  # pyright: ignore[reportArgumentType]
    given_BS = tf.where(tokens_BS < 0, setting.arguments[0], tokens_BS)
    found_BV = setting.function(given_BS, scores_BV)
    check_returned(found_BV, scores_BV, setting)
    return tf.cast(found_BV, scores_BV.dtype)


def temperature(scores_BV: tf.Tensor, history: History, setting: Setting) -> tf.Tensor:
    """Sharpen the distribution below 1, flatten it above."""
    del history
    return scores_BV / setting.arguments[0]


def top_k(scores_BV: tf.Tensor, history: History, setting: Setting) -> tf.Tensor:
    """Keep the best tokens."""
    del history
    (last,) = setting.arguments
    best_BK = tf.math.top_k(scores_BV, setting.size).values
    return rule_out(scores_BV < tf.gather(best_BK, last, axis=1)[:, None], scores_BV)


def top_p(scores_BV: tf.Tensor, history: History, setting: Setting) -> tf.Tensor:
    """Leave out the unlikeliest tokens, as long as together they have no more probability than allowed."""
    del history
    (removable,) = setting.arguments
    order_BV = tf.argsort(scores_BV, axis=1, stable=True)
    sorted_BV = tf.gather(scores_BV, order_BV, axis=1, batch_dims=1)
    ranks_V = tf.range(vocab_size(scores_BV))
    kept_V = ranks_V >= vocab_size(scores_BV) - setting.size
    removed_BV = (running_sum(softmax(sorted_BV)) <= removable) & tf.logical_not(kept_V)
    return rule_out(unsorted(removed_BV, order_BV), scores_BV)


def min_p(scores_BV: tf.Tensor, history: History, setting: Setting) -> tf.Tensor:
    """Leave out tokens far less likely than the best."""
    del history
    (share,) = setting.arguments
    probabilities_BV = softmax(scores_BV)
    removed_BV = probabilities_BV < share * tf.reduce_max(probabilities_BV, axis=1, keepdims=True)
    order_BV = tf.argsort(-scores_BV, axis=1, stable=True)
    ranks_V = tf.range(vocab_size(scores_BV))
    kept_BV = tf.broadcast_to(ranks_V < setting.size, scores_BV.shape)
    return rule_out(removed_BV & tf.logical_not(unsorted(kept_BV, order_BV)), scores_BV)


def typical_p(scores_BV: tf.Tensor, history: History, setting: Setting) -> tf.Tensor:
    """Keep tokens whose information is nearest to the distribution's entropy (Meister et al. 2022)."""
    del history
    (mass,) = setting.arguments
    log_BV = log_softmax(scores_BV)
    distance_BV = tf.abs(-log_BV - entropy(log_BV))
    order_BV = tf.argsort(distance_BV, axis=1, stable=True)
    sorted_BV = tf.gather(distance_BV, order_BV, axis=1, batch_dims=1)
    total_BV = running_sum(tf.gather(softmax(scores_BV), order_BV, axis=1, batch_dims=1))
    last_B = tf.minimum(tf.reduce_sum(tf.cast(total_BV < mass, tf.int32), axis=1), vocab_size(scores_BV) - 1)
    ranks_V = tf.range(vocab_size(scores_BV))
    removed_BV = (sorted_BV > tf.gather(sorted_BV, last_B[:, None], axis=1, batch_dims=1)) & (ranks_V >= setting.size)
    return rule_out(unsorted(removed_BV, order_BV), scores_BV)


def epsilon_cutoff(scores_BV: tf.Tensor, history: History, setting: Setting) -> tf.Tensor:
    """Leave out unlikely tokens (Hewitt et al. 2022)."""
    del history
    (epsilon,) = setting.arguments
    removed_BV = (softmax(scores_BV) < epsilon) & below_best(scores_BV, setting.size)
    return rule_out(removed_BV, scores_BV)


def eta_cutoff(scores_BV: tf.Tensor, history: History, setting: Setting) -> tf.Tensor:
    """Leave out tokens unlikely for the distribution's entropy (Hewitt et al. 2022)."""
    del history
    (epsilon,) = setting.arguments
    log_BV = log_softmax(scores_BV)
    eta_B1 = tf.minimum(epsilon, tf.sqrt(epsilon) * tf.exp(-entropy(log_BV)))
    removed_BV = (tf.exp(log_BV) < eta_B1) & below_best(scores_BV, setting.size)
    return rule_out(removed_BV, scores_BV)


def lefthash(scores_BV: tf.Tensor, history: History, setting: Setting) -> tf.Tensor:
    """Favour tokens that are green after the context."""
    context_BW = history.last(setting.size)
    seed_B1 = tf.cast(setting.arguments[0], tf.int64)
    for place in range(setting.size):
        token_B1 = tf.cast(tf.maximum(context_BW[:, place : place + 1], 0), tf.int64)
        seed_B1 = mixed(tf.bitwise.bitwise_xor(seed_B1, token_B1))
    own_V = mixed(tf.range(vocab_size(scores_BV), dtype=tf.int64))
    return favour(mixed(tf.bitwise.bitwise_xor(seed_B1, own_V)), scores_BV, context_BW, setting)


def selfhash(scores_BV: tf.Tensor, history: History, setting: Setting) -> tf.Tensor:
    """Favour tokens that are green together with the context."""
    context_BW = history.last(setting.size)
    secret = tf.cast(setting.arguments[0], tf.int64)
    own_V = mixed(tf.range(vocab_size(scores_BV), dtype=tf.int64))
    least_BV = tf.fill(own_V.shape, tf.constant(MASK, tf.int64))
    for place in range(setting.size):
        token_B1 = tf.cast(tf.maximum(context_BW[:, place : place + 1], 0), tf.int64)
        seed_B1 = mixed(tf.bitwise.bitwise_xor(secret, token_B1))
        least_BV = tf.minimum(least_BV, mixed(tf.bitwise.bitwise_xor(seed_B1, own_V)))
    return favour(mixed(least_BV), scores_BV, context_BW, setting)


def favour(hashes_BV: tf.Tensor, scores_BV: tf.Tensor, context_BW: tf.Tensor, setting: Setting) -> tf.Tensor:
    """Add a bias to the tokens that are green, where the context is whole."""
    _, threshold, bias = setting.arguments
    green_BV = (hashes_BV < tf.cast(threshold, tf.int64)) & tf.reduce_all(context_BW >= 0, axis=1, keepdims=True)
    return scores_BV + tf.where(green_BV, bias, tf.zeros_like(bias))


def mixed(bits: tf.Tensor) -> tf.Tensor:
    """The hash of 32-bit numbers, held in 64 bits."""
    bits = tf.bitwise.bitwise_and(bits + INCREMENT, MASK)
    for _ in range(2):
        bits = tf.bitwise.bitwise_xor(bits, tf.bitwise.right_shift(bits, 16))
        bits = tf.bitwise.bitwise_and(bits * MULTIPLIER, MASK)
    return tf.bitwise.bitwise_xor(bits, tf.bitwise.right_shift(bits, 16))


def renormalize(scores_BV: tf.Tensor, history: History, setting: Setting) -> tf.Tensor:
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


def choose(scores_BV: tf.Tensor, uniforms_B: tf.Tensor | None) -> tf.Tensor:
    """The next token of each row: the likeliest, or the one whose share of the probabilities holds a number."""
    tokens_B = likeliest(scores_BV) if uniforms_B is None else sample(scores_BV, uniforms_B)
    return tf.where(tf.reduce_max(scores_BV, axis=1) > -np.inf, tokens_B, -1)


def likeliest(scores_BV: tf.Tensor) -> tf.Tensor:
    """The first of the likeliest tokens of each row."""
    # XLA's search for a place takes several times as long as those for the largest number and for the least place.
    is_best_BV = scores_BV == tf.reduce_max(scores_BV, axis=1, keepdims=True)
    last = vocab_size(scores_BV) - 1
    return tf.reduce_min(tf.where(is_best_BV, tf.range(last + 1), last), axis=1)


def sample(scores_BV: tf.Tensor, uniforms_B: tf.Tensor) -> tf.Tensor:
    """The first token up to which the probabilities, summed in the order of ids, exceed a number's share of the sum."""
    probabilities_BV = softmax(scores_BV)
    total_BV = running_sum(probabilities_BV)
    possible_BV = probabilities_BV > 0
    reached_BV = possible_BV & (total_BV > tf.cast(uniforms_B, total_BV.dtype)[:, None] * total_BV[:, -1:])
    first_B = tf.argmax(tf.cast(reached_BV, tf.int32), axis=1, output_type=tf.int32)
    last_B = (
        vocab_size(scores_BV) - 1 - tf.argmax(tf.cast(possible_BV[:, ::-1], tf.int32), axis=1, output_type=tf.int32)
    )
    return tf.where(tf.reduce_any(reached_BV, axis=1), first_B, last_B)


def softmax(scores_BV: tf.Tensor) -> tf.Tensor:
    """Probabilities; all 0 where every token is ruled out."""
    weights_BV = tf.exp(shifted(scores_BV))
    sums_B1 = tf.reduce_sum(weights_BV, axis=1, keepdims=True)
    return weights_BV / tf.where(sums_B1 > 0, sums_B1, tf.ones_like(sums_B1))


def log_softmax(scores_BV: tf.Tensor) -> tf.Tensor:
    """Log-probabilities; -inf throughout where every token is ruled out."""
    shifted_BV = shifted(scores_BV)
    sums_B1 = tf.reduce_sum(tf.exp(shifted_BV), axis=1, keepdims=True)
    return shifted_BV - tf.math.log(tf.where(sums_B1 > 0, sums_B1, tf.ones_like(sums_B1)))


def shifted(scores_BV: tf.Tensor) -> tf.Tensor:
    """Scores below the best one, whose exponentials can't overflow."""
    best_B1 = tf.reduce_max(scores_BV, axis=1, keepdims=True)
    return scores_BV - tf.where(best_B1 > -np.inf, best_B1, tf.zeros_like(best_B1))


def running_sum(values_BV: tf.Tensor) -> tf.Tensor:
    """Cumulative sums, each rounded once, so that no order of sums shows."""
    return tf.cast(tf.cumsum(tf.cast(values_BV, tf.float64), axis=1), values_BV.dtype)


def entropy(log_BV: tf.Tensor) -> tf.Tensor:
    """Expected information of log-probabilities, (B, 1)."""
    finite_BV = tf.where(log_BV > -np.inf, log_BV, tf.zeros_like(log_BV))
    return -tf.reduce_sum(tf.exp(log_BV) * finite_BV, axis=1, keepdims=True)


def below_best(scores_BV: tf.Tensor, count: int) -> tf.Tensor:
    """Which scores are below the `count` best, (B, V)."""
    return scores_BV < tf.math.top_k(scores_BV, min(count, vocab_size(scores_BV))).values[:, -1:]


def unsorted(sorted_BV: tf.Tensor, order_BV: tf.Tensor) -> tf.Tensor:
    """Bring flags in sorted order back into the order of ids."""
    B, V = sorted_BV.shape
    rows_BV = tf.broadcast_to(tf.range(B)[:, None], (B, V))
    places_BV2 = tf.stack((rows_BV, order_BV), axis=-1)
    return tf.scatter_nd(places_BV2, tf.cast(sorted_BV, tf.int32), (B, V)) > 0


def rule_out(removed_BV: tf.Tensor, scores_BV: tf.Tensor) -> tf.Tensor:
    """Scores, -inf where a token is removed."""
    return tf.where(removed_BV, tf.constant(-np.inf, scores_BV.dtype), scores_BV)


def members(setting: Setting, scores_BV: tf.Tensor) -> tf.Tensor:
    """Which tokens of the vocabulary a processor is about, (V,)."""
    (ids,) = setting.arguments
    return tf.scatter_nd(ids[:, None], tf.ones_like(ids), (vocab_size(scores_BV),)) > 0


def vocab_size(scores_BV: tf.Tensor) -> int:
    """V, which every trace knows."""
    size = scores_BV.shape[1]
    assert size is not None
    return size
