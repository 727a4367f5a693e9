"""What is done to scores before a token is chosen, in PyTorch: `opt_common.processors`, on the device of the scores."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from opt_common.processors import Program, Setting, check_returned
from opt_common.watermark import INCREMENT, MASK, MULTIPLIER


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class History:
    """The text so far; see `opt_common.processors.History`."""

    tokens_BS: Tensor
    attended_BS: Tensor
    length: int

    def of(self, rows_B: Tensor | np.ndarray) -> "History":
        """The texts of some rows."""
        return dataclasses.replace(self, tokens_BS=self.tokens_BS[rows_B], attended_BS=self.attended_BS[rows_B])

    def each(self, count: int) -> "History":
        """The texts up to each of the last `count` tokens, `count` rows for one, moved so that all end at `length`."""
        slots_S = torch.arange(self.tokens_BS.shape[1], device=self.tokens_BS.device)
        slots_CS = slots_S - (count - 1 - torch.arange(count, device=slots_S.device))[:, None]
        there_CS = (slots_CS >= 0) & (slots_S < self.length)
        return dataclasses.replace(
            self,
            tokens_BS=self.tokens_BS[:, slots_CS.clamp(min=0)].flatten(0, 1),
            attended_BS=(self.attended_BS[:, slots_CS.clamp(min=0)] & there_CS).flatten(0, 1),
        )

    def last(self, count: int) -> Tensor:
        """The last `count` ids of each row, (B, count); -1 where there is no text."""
        positions = self.length - count + torch.arange(count, device=self.tokens_BS.device)
        slots = positions.clamp(min=0)
        there = self.attended_BS[:, slots] & (positions >= 0)
        return torch.where(there, self.tokens_BS[:, slots], -1)

    def seen(self, counted_BS: Tensor, vocab_size: int) -> Tensor:
        """Which tokens of the vocabulary stand in some slots, (B, V)."""
        counts_BV = counted_BS.new_zeros((len(counted_BS), vocab_size), dtype=torch.int32)
        return counts_BV.scatter_add(1, self.tokens_BS, counted_BS.int()) > 0


def process(
    scores_BV: Tensor, history: History, program: Program, arguments: Sequence[tuple[Tensor, ...]], gates_P: Tensor
) -> Tensor:
    """Let each processor act in its turn."""
    for place, (name, size, function) in enumerate(program):
        numbers = tuple(value.to(scores_BV.dtype) if value.is_floating_point() else value for value in arguments[place])
        gate = gates_P[place].to(scores_BV.dtype)
        setting = Setting(size=size, function=function, arguments=numbers, gate=gate)
        scores_BV = PROCESSORS[name](scores_BV, history, setting)
    return scores_BV


def sequence_bias(scores_BV: Tensor, history: History, setting: Setting) -> Tensor:
    """Add a bias to the token that completes a sequence. -1 in a prefix stands for any token."""
    prefixes_KM, tokens_K, biases_K = setting.arguments
    last_BM = history.last(prefixes_KM.shape[1])
    fits_BK = ((prefixes_KM == -1) | (last_BM[:, None] == prefixes_KM)).all(-1)
    bias_BK = torch.where(fits_BK, biases_K, 0)
    bias_BV = torch.zeros_like(scores_BV).index_add(1, tokens_K, bias_BK)
    return scores_BV + bias_BV


def diversity(scores_BV: Tensor, history: History, setting: Setting) -> Tensor:
    """Make tokens that other groups of beams have chosen in this step less likely (Vijayakumar et al. 2016)."""
    del history
    penalty, chosen_BV = setting.arguments
    return scores_BV - penalty * chosen_BV


def repetition_penalty(scores_BV: Tensor, history: History, setting: Setting) -> Tensor:
    """Make tokens that the text has less likely, each once however often it occurs."""
    (penalty,) = setting.arguments
    seen_BV = history.seen(history.attended_BS, scores_BV.shape[1])
    penalised_BV = torch.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty)
    return torch.where(seen_BV, penalised_BV, scores_BV)


def no_repeat_ngram_size(scores_BV: Tensor, history: History, setting: Setting) -> Tensor:
    """Rule out each token that followed the last n - 1 tokens before."""
    last_BM = history.last(setting.size - 1)
    tokens_BS = torch.where(history.attended_BS, history.tokens_BS, -1)
    repeated_BS = history.attended_BS
    for back in range(1, setting.size):
        before_BS = torch.nn.functional.pad(tokens_BS, (back, 0), value=-1)[:, : tokens_BS.shape[1]]
        repeated_BS = repeated_BS & (before_BS >= 0) & (before_BS == last_BM[:, -back, None])
    return rule_out(history.seen(repeated_BS, scores_BV.shape[1]), scores_BV)


def suppress(scores_BV: Tensor, history: History, setting: Setting) -> Tensor:
    """Rule out some ids while the gate is open."""
    del history
    return rule_out(members(setting, scores_BV) & (setting.gate > 0), scores_BV)


def force(scores_BV: Tensor, history: History, setting: Setting) -> Tensor:
    """Rule out all but some ids while the gate is open; those are equals."""
    del history
    forced_V = torch.where(members(setting, scores_BV), 0.0, -torch.inf).to(scores_BV.dtype)
    return torch.where(setting.gate > 0, forced_V, scores_BV)


def exponential_decay(scores_BV: Tensor, history: History, setting: Setting) -> Tensor:
    """Raise the scores of some ids by their magnitudes, gate - 1 times."""
    del history
    raised_BV = members(setting, scores_BV) & (scores_BV > -torch.inf)
    magnitudes_BV = torch.where(raised_BV, scores_BV.abs(), 0)
    return scores_BV + magnitudes_BV * (setting.gate - 1)


def function(scores_BV: Tensor, history: History, setting: Setting) -> Tensor:
    """Let a function of the user's act. It is given the text at the right end of (B, S) ids, pad tokens on its left."""
    assert setting.function is not None
    tokens_BS = history.last(history.length)
    given_BS = torch.where(tokens_BS < 0, setting.arguments[0], tokens_BS)
    found_BV = setting.function(given_BS, scores_BV)
    check_returned(found_BV, scores_BV, setting)
    return found_BV.to(scores_BV.dtype)


def temperature(scores_BV: Tensor, history: History, setting: Setting) -> Tensor:
    """Sharpen the distribution below 1, flatten it above."""
    del history
    return scores_BV / setting.arguments[0]


def top_k(scores_BV: Tensor, history: History, setting: Setting) -> Tensor:
    """Keep the best tokens."""
    del history
    (last,) = setting.arguments
    best_BK = scores_BV.topk(setting.size, dim=1).values
    return rule_out(scores_BV < best_BK[:, last, None], scores_BV)


def top_p(scores_BV: Tensor, history: History, setting: Setting) -> Tensor:
    """Leave out the unlikeliest tokens, as long as together they have no more probability than allowed."""
    del history
    (removable,) = setting.arguments
    order_BV = scores_BV.argsort(dim=1, stable=True)
    sorted_BV = scores_BV.gather(1, order_BV)
    ranks_V = torch.arange(scores_BV.shape[1], device=scores_BV.device)
    kept_V = ranks_V >= scores_BV.shape[1] - setting.size
    removed_BV = (running_sum(softmax(sorted_BV)) <= removable) & ~kept_V
    return rule_out(unsorted(removed_BV, order_BV), scores_BV)


def min_p(scores_BV: Tensor, history: History, setting: Setting) -> Tensor:
    """Leave out tokens far less likely than the best."""
    del history
    (share,) = setting.arguments
    probabilities_BV = softmax(scores_BV)
    removed_BV = probabilities_BV < share * probabilities_BV.amax(1, keepdim=True)
    order_BV = (-scores_BV).argsort(dim=1, stable=True)
    ranks_V = torch.arange(scores_BV.shape[1], device=scores_BV.device)
    kept_BV = (ranks_V < setting.size).expand_as(scores_BV)
    return rule_out(removed_BV & ~unsorted(kept_BV, order_BV), scores_BV)


def typical_p(scores_BV: Tensor, history: History, setting: Setting) -> Tensor:
    """Keep tokens whose information is nearest to the distribution's entropy (Meister et al. 2022)."""
    del history
    (mass,) = setting.arguments
    log_BV = log_softmax(scores_BV)
    distance_BV = (-log_BV - entropy(log_BV)).abs()
    order_BV = distance_BV.argsort(dim=1, stable=True)
    sorted_BV = distance_BV.gather(1, order_BV)
    total_BV = running_sum(softmax(scores_BV).gather(1, order_BV))
    last_B = (total_BV < mass).sum(1).clamp(max=scores_BV.shape[1] - 1)
    ranks_V = torch.arange(scores_BV.shape[1], device=scores_BV.device)
    removed_BV = (sorted_BV > sorted_BV.gather(1, last_B[:, None])) & (ranks_V >= setting.size)
    return rule_out(unsorted(removed_BV, order_BV), scores_BV)


def epsilon_cutoff(scores_BV: Tensor, history: History, setting: Setting) -> Tensor:
    """Leave out unlikely tokens (Hewitt et al. 2022)."""
    del history
    (epsilon,) = setting.arguments
    removed_BV = (softmax(scores_BV) < epsilon) & below_best(scores_BV, setting.size)
    return rule_out(removed_BV, scores_BV)


def eta_cutoff(scores_BV: Tensor, history: History, setting: Setting) -> Tensor:
    """Leave out tokens unlikely for the distribution's entropy (Hewitt et al. 2022)."""
    del history
    (epsilon,) = setting.arguments
    log_BV = log_softmax(scores_BV)
    eta_B1 = torch.minimum(epsilon, epsilon.sqrt() * (-entropy(log_BV)).exp())
    removed_BV = (log_BV.exp() < eta_B1) & below_best(scores_BV, setting.size)
    return rule_out(removed_BV, scores_BV)


def lefthash(scores_BV: Tensor, history: History, setting: Setting) -> Tensor:
    """Favour tokens that are green after the context."""
    context_BW = history.last(setting.size)
    seed_B1 = setting.arguments[0].long()
    for place in range(setting.size):
        token_B1 = context_BW[:, place : place + 1].clamp(min=0)
        seed_B1 = mixed(seed_B1 ^ token_B1)
    own_V = mixed(torch.arange(scores_BV.shape[1], device=scores_BV.device))
    return favour(mixed(seed_B1 ^ own_V), scores_BV, context_BW, setting)


def selfhash(scores_BV: Tensor, history: History, setting: Setting) -> Tensor:
    """Favour tokens that are green together with the context."""
    context_BW = history.last(setting.size)
    secret = setting.arguments[0].long()
    own_V = mixed(torch.arange(scores_BV.shape[1], device=scores_BV.device))
    least_BV = torch.full_like(own_V, MASK)
    for place in range(setting.size):
        token_B1 = context_BW[:, place : place + 1].clamp(min=0)
        seed_B1 = mixed(secret ^ token_B1)
        least_BV = torch.minimum(least_BV, mixed(seed_B1 ^ own_V))
    return favour(mixed(least_BV), scores_BV, context_BW, setting)


def favour(hashes_BV: Tensor, scores_BV: Tensor, context_BW: Tensor, setting: Setting) -> Tensor:
    """Add a bias to the tokens that are green, where the context is whole."""
    _, threshold, bias = setting.arguments
    green_BV = (hashes_BV < threshold.long()) & (context_BW >= 0).all(1, keepdim=True)
    return scores_BV + torch.where(green_BV, bias, 0)


def mixed(bits: Tensor) -> Tensor:
    """The hash of 32-bit numbers, held in 64 bits."""
    bits = (bits + INCREMENT) & MASK
    for _ in range(2):
        bits = ((bits ^ (bits >> 16)) * MULTIPLIER) & MASK
    return bits ^ (bits >> 16)


def renormalize(scores_BV: Tensor, history: History, setting: Setting) -> Tensor:
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


def choose(scores_BV: Tensor, uniforms_B: Tensor | None) -> Tensor:
    """The next token of each row: the likeliest, or the one whose share of the probabilities holds a number."""
    tokens_B = likeliest(scores_BV) if uniforms_B is None else sample(scores_BV, uniforms_B)
    return torch.where(scores_BV.amax(1) > -torch.inf, tokens_B, -1)


def likeliest(scores_BV: Tensor) -> Tensor:
    """The first of the likeliest tokens of each row."""
    if scores_BV.device.type == "cpu":
        # NumPy searches many times as fast.
        return torch.from_numpy(scores_BV.detach().numpy().argmax(1))
    return scores_BV.argmax(1)


def sample(scores_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """The first token up to which the probabilities, summed in the order of ids, exceed a number's share of the sum."""
    probabilities_BV = softmax(scores_BV)
    total_BV = running_sum(probabilities_BV)
    possible_BV = probabilities_BV > 0
    reached_BV = possible_BV & (total_BV > uniforms_B.to(total_BV.dtype)[:, None] * total_BV[:, -1:])
    first_B = reached_BV.int().argmax(1)
    last_B = scores_BV.shape[1] - 1 - possible_BV.flip(1).int().argmax(1)
    return torch.where(reached_BV.any(1), first_B, last_B)


def softmax(scores_BV: Tensor) -> Tensor:
    """Probabilities; all 0 where every token is ruled out."""
    weights_BV = shifted(scores_BV).exp()
    sums_B1 = weights_BV.sum(1, keepdim=True)
    return weights_BV / torch.where(sums_B1 > 0, sums_B1, 1)


def log_softmax(scores_BV: Tensor) -> Tensor:
    """Log-probabilities; -inf throughout where every token is ruled out."""
    shifted_BV = shifted(scores_BV)
    sums_B1 = shifted_BV.exp().sum(1, keepdim=True)
    return shifted_BV - torch.where(sums_B1 > 0, sums_B1, 1).log()


def shifted(scores_BV: Tensor) -> Tensor:
    """Scores below the best one, whose exponentials can't overflow."""
    best_B1 = scores_BV.amax(1, keepdim=True)
    return scores_BV - torch.where(best_B1 > -torch.inf, best_B1, 0)


def running_sum(values_BV: Tensor) -> Tensor:
    """Cumulative sums, each rounded once, so that no order of sums shows."""
    return values_BV.cumsum(1, dtype=torch.float64).to(values_BV.dtype)


def entropy(log_BV: Tensor) -> Tensor:
    """Expected information of log-probabilities, (B, 1)."""
    finite_BV = torch.where(log_BV > -torch.inf, log_BV, 0)
    return -(log_BV.exp() * finite_BV).sum(1, keepdim=True)


def below_best(scores_BV: Tensor, count: int) -> Tensor:
    """Which scores are below the `count` best, (B, V)."""
    return scores_BV < scores_BV.topk(min(count, scores_BV.shape[1]), dim=1).values[:, -1:]


def unsorted(sorted_BV: Tensor, order_BV: Tensor) -> Tensor:
    """Bring flags in sorted order back into the order of ids."""
    return torch.zeros_like(sorted_BV).scatter(1, order_BV, sorted_BV)


def rule_out(removed_BV: Tensor, scores_BV: Tensor) -> Tensor:
    """Scores, -inf where a token is removed."""
    return torch.where(removed_BV, -torch.inf, scores_BV)


def members(setting: Setting, scores_BV: Tensor) -> Tensor:
    """Which tokens of the vocabulary a processor is about, (V,)."""
    members_V = torch.zeros(scores_BV.shape[1], dtype=torch.bool, device=scores_BV.device)
    return members_V.index_fill(0, setting.arguments[0].long(), True)
