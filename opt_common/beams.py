"""Beam search: how beams are kept, which continuations end, and when to stop.

The rules are Hugging Face's (transformers 4.57; for groups and constraints 4.55, the last version that had them).
Each step selects, for each prompt, more continuations than there are beams, since those that end go on no longer:
1 + number of end-of-text ids, but at least 2, for each beam. Of these,

- those among the first `num_beams` that end, by whatever `opt_common.stopping` knows, are finished, with the score
  `sum / length ** length_penalty`, the sum being that of the log-probabilities and the length that of the new tokens
  with the end; the best `num_beams` of them are kept;
- of the others, the best `num_beams` are the beams of the next step; they end where no tokens are left.

A prompt is done when it has `num_beams` finished texts and `early_stopping` is True or no beam can do better: judged
by its present length or, with "never" and a positive `length_penalty`, by the longest it could get.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

from opt_common.constraints import Progress
from opt_common.decoding import Arrays, Choice, Generated, Ids, Prompt, Reader, Selection, check_possible, details_of
from opt_common.errors import GenerationError
from opt_common.generation_config import GenerationConfig
from opt_common.processors import power_of_two

Totals = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """Continuations of one prompt's beams.

    Attributes:
        totals_C: sum of the log-probabilities of all new tokens; -inf for what is none.
        beams_C: which beam each continues.
        tokens_C: the token that it is continued with.
    """

    totals_C: Totals
    beams_C: Ids
    tokens_C: Ids

    def at(self, places: Ids) -> "Candidates":
        """Some of them, in another order."""
        return Candidates(totals_C=self.totals_C[places], beams_C=self.beams_C[places], tokens_C=self.tokens_C[places])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Hypothesis:
    """The new tokens of one beam: n of them.

    Attributes:
        tokens_T: (n,) ids.
        beams_T: (n,) the beam that each token continued.
        totals_T: (n,) sum of the log-probabilities up to each.
        progress: how far the text has come with what it must contain, if anything.
    """

    tokens_T: Ids
    beams_T: Ids
    totals_T: Totals
    progress: Progress | None = None

    def continued(self, total: float, beam: int, token: int) -> "Hypothesis":
        """The text with one more token."""
        return Hypothesis(
            tokens_T=np.append(self.tokens_T, token),
            beams_T=np.append(self.beams_T, beam),
            totals_T=np.append(self.totals_T, total),
            progress=None if self.progress is None else self.progress.after(token),
        )

    def score(self, length_penalty: float) -> float:
        """What finished texts are ranked by."""
        return float(self.totals_T[-1]) / len(self.tokens_T) ** length_penalty


class Beams:
    """The beams of one prompt, or of one of its groups.

    Attributes:
        running: at most K texts, best first.
        finished: at most K texts, best first.
        done: whether nothing changes any more.
    """

    def __init__(self, settings: GenerationConfig, prompt: Prompt, row: int) -> None:
        self.settings = settings
        self.new_tokens = prompt.new_tokens
        self.stopping = prompt.stopping
        self.prompt_T = prompt.input_ids[row] if prompt.has_ids else prompt.input_ids[row, :0]
        self.width = settings.num_beams // settings.num_beam_groups
        nothing = np.zeros(0, np.int64)
        self.running: list[Hypothesis] = [Hypothesis(tokens_T=nothing, beams_T=nothing, totals_T=np.zeros(0))]
        self.finished: list[Hypothesis] = []
        self.done = False

    @property
    def totals(self) -> Totals:
        """The sum of each beam that runs, (K,): -inf for those that there are too few of."""
        totals = [float(text.totals_T[-1]) if text.totals_T.size else 0.0 for text in self.running]
        return np.array(totals + [-np.inf] * (self.width - len(totals)))

    def advance(self, candidates: Candidates) -> None:
        """Go on by one token."""
        last = len(self.running[0].tokens_T) + 1 == self.new_tokens
        candidates = candidates.at(np.flatnonzero(candidates.totals_C > -np.inf))
        ends_C = self.ended(candidates)
        ending = candidates.at(np.flatnonzero(ends_C[: self.width]))
        others = candidates.at(np.flatnonzero(~ends_C))
        others = others.at(np.argsort(-others.totals_C, kind="stable")[: self.width])
        finished = self.continued(ending)
        self.running = self.continued(self.chosen(others))
        self.finish(finished + self.running if last else finished)
        self.done = last or not self.running or self.is_decided()

    def ended(self, candidates: Candidates) -> npt.NDArray[np.bool_]:
        """Which candidates, (C,), end their texts."""
        ids_CT = candidates.tokens_C[:, None]
        if self.stopping.reads_text and len(ids_CT):
            before = [np.concatenate([self.prompt_T, self.running[int(beam)].tokens_T]) for beam in candidates.beams_C]
            ids_CT = np.concatenate([np.stack(before), ids_CT], axis=1)
        return self.stopping.ended(ids_CT)

    def continued(self, candidates: Candidates) -> list[Hypothesis]:
        """The texts of some candidates."""
        rows = zip(candidates.totals_C, candidates.beams_C, candidates.tokens_C, strict=True)
        return [self.running[int(beam)].continued(float(total), int(beam), int(token)) for total, beam, token in rows]

    def chosen(self, candidates: Candidates) -> Candidates:
        """The beams of the next step: the best candidates, unless a constraint says otherwise."""
        return candidates

    def finish(self, texts: list[Hypothesis]) -> None:
        """Keep the best of the finished texts; of equals those that were there before."""
        penalty = self.settings.length_penalty
        texts = sorted(self.finished + texts, key=lambda text: -text.score(penalty))
        self.finished = texts[: self.width]

    def is_decided(self) -> bool:
        """Whether no beam can change which texts are the best, as far as `early_stopping` wants to know it."""
        if len(self.finished) < self.width:
            return False
        if self.settings.early_stopping is True:
            return True
        penalty = self.settings.length_penalty
        longest = self.settings.early_stopping == "never" and penalty > 0
        length = self.new_tokens if longest else len(self.running[0].tokens_T)
        return bool(self.totals.max() / length**penalty <= self.finished[-1].score(penalty))

    def results(self) -> list[Hypothesis]:
        """The texts to choose the best from."""
        return self.finished


class ConstrainedBeams(Beams):
    """Beams of a text that must contain something (Hokamp and Liu 2017; Post and Vilar 2018)."""

    def __init__(self, settings: GenerationConfig, prompt: Prompt, row: int) -> None:
        super().__init__(settings, prompt, row)
        self.running = [dataclasses.replace(self.running[0], progress=Progress.of(settings.all_constraints))]
        self.spare: list[Hypothesis] = []
        self.asked: Candidates | None = None

    def advance(self, candidates: Candidates, asked: Candidates | None = None) -> None:
        """Go on by one token; `asked` are the continuations that lead on with the constraints."""
        self.asked = asked
        super().advance(candidates)

    def next_tokens(self) -> list[tuple[int, ...]]:
        """The tokens that lead each beam on."""
        return [_progress(text).next_tokens for text in self.running]

    def chosen(self, candidates: Candidates) -> Candidates:
        """Beams of every stage of fulfillment by turns: the best of each, those furthest on first."""
        assert self.asked is not None
        known = set(zip(candidates.beams_C.tolist(), candidates.tokens_C.tolist(), strict=True))
        pairs = zip(self.asked.beams_C.tolist(), self.asked.tokens_C.tolist(), strict=True)
        new = [place for place, pair in enumerate(pairs) if pair not in known and self.asked.totals_C[place] > -np.inf]
        added = self.asked.at(np.array(new, np.int64))
        candidates = Candidates(
            totals_C=np.append(candidates.totals_C, added.totals_C),
            beams_C=np.append(candidates.beams_C, added.beams_C),
            tokens_C=np.append(candidates.tokens_C, added.tokens_C),
        )
        banks = np.array([_progress(text).bank for text in self.continued(candidates)], dtype=np.int64)
        order = np.lexsort((-candidates.totals_C, -banks))
        # The turn in which each comes: its rank among those of the same bank.
        turns = np.array([(banks[order[:place]] == banks[own]).sum() for place, own in enumerate(order)], np.int64)
        return candidates.at(order[np.argsort(turns, kind="stable")][: self.width])

    def finish(self, texts: list[Hypothesis]) -> None:
        """Keep the best of those that fulfil the constraints, and at the end the others, for want of better ones."""
        complete = [text for text in texts if _progress(text).complete]
        self.spare = [text for text in texts if not _progress(text).complete]
        super().finish(complete)

    def results(self) -> list[Hypothesis]:
        """Texts that fulfil the constraints, and others only where those are too few."""
        penalty = self.settings.length_penalty
        spare = sorted(self.spare, key=lambda text: -text.score(penalty))
        return self.finished + spare[: max(self.settings.num_return_sequences - len(self.finished), 0)]


def _progress(text: Hypothesis) -> Progress:
    assert text.progress is not None
    return text.progress


def continuations(settings: GenerationConfig) -> int:
    """How many continuations a step selects for each prompt, or for each of its groups: enough to go on with."""
    return max(2, 1 + len(settings.eos_token_id)) * (settings.num_beams // settings.num_beam_groups)


def search(reader: Reader, prompt: Prompt, settings: GenerationConfig) -> Generated:
    """Continue prompts by beam search, in any of its forms.

    Raises:
        GenerationError: where a prompt has no token to go on with, or fewer texts than are asked for.
    """
    run = _Run(prompt, settings)
    details: list[Arrays] = []
    for step in range(prompt.new_tokens):
        choice = run.choice(step)
        found = reader.read(run.last_tokens(), choice) if step else reader.start(choice)
        run.advance(found)
        details.append({name: np.repeat(found[name], run.rows // len(found[name]), axis=0) for name in run.details})
        check_possible(run.stuck(), np.zeros(len(prompt.input_ids), bool), step)
        if all(beams.done for beams in run.beams):
            break
    scores, logits = (
        tuple(arrays[name] for arrays in details) if name in run.details else None for name in ("scores", "logits")
    )
    return dataclasses.replace(run.generated(), scores=scores, logits=logits)


class _Run:
    """All beams of a run. Those of prompt b and its group g are number i = b * groups + g; their rows i * K + beam."""

    def __init__(self, prompt: Prompt, settings: GenerationConfig) -> None:
        self.prompt, self.settings = prompt, settings
        kind = ConstrainedBeams if settings.strategy == "constrained_beam_search" else Beams
        count = len(prompt.input_ids) * settings.num_beam_groups
        self.beams = [kind(settings, prompt, i // settings.num_beam_groups) for i in range(count)]
        self.width = settings.num_beams // settings.num_beam_groups
        self.rows = count * self.width
        self.details = tuple(name for name in details_of(settings) if name != "logprobs")
        # How many tokens can lead a beam on, rounded up so that other phrases need no other program.
        self.ways = power_of_two(sum(len(constraint.phrases) for constraint in settings.all_constraints))

    def choice(self, step: int) -> Choice:
        """What a step is told."""
        settings, shape = self.settings, (len(self.prompt.input_ids), self.settings.num_beam_groups)
        # Before the first step there is one beam, so that no text is counted twice.
        totals = [beams.totals if step else np.zeros(1) for beams in self.beams]
        name, arguments = "beams", ()
        if settings.strategy == "beam_sample":
            assert self.prompt.uniforms is not None
            name, arguments = "drawn_beams", (self.prompt.uniforms[:, step],)
        elif settings.strategy == "group_beam_search":
            ends_E = np.array(settings.eos_token_id or (-1,), np.int32)
            open_BG = ~np.array([beams.done for beams in self.beams]).reshape(shape)
            name, arguments = "beam_groups", (ends_E, open_BG, np.array(self.width, np.int32))
        elif settings.strategy == "constrained_beam_search":
            name, arguments = "asked_beams", (self.asked(1 if step == 0 else self.width),)
        return Choice(
            gates_P=self.prompt.gates(step),
            selection=Selection(name, continuations(settings), self.details),
            arguments=(np.stack(totals).reshape(*shape, -1), *arguments),
            rows_B=self.parents(step) if step else None,
        )

    def parents(self, step: int) -> Ids:
        """The row that each row continues, (rows,). Before the second step each prompt has one."""
        rows = np.arange(self.rows).reshape(-1, self.width)
        for i, beams in enumerate(self.beams):
            parents = [0 if beams.done else int(text.beams_T[-1]) for text in beams.running[: self.width]]
            rows[i] = i * self.width + np.array(parents + [0] * (self.width - len(parents)))
            if step == 1:
                rows[i] = i // self.settings.num_beam_groups
        return rows.ravel()

    def last_tokens(self) -> Ids:
        """What each row reads next, (rows, 1)."""
        tokens = np.full((len(self.beams), self.width), self.settings.padding)
        for i, beams in enumerate(self.beams):
            for beam, text in enumerate(beams.running):
                tokens[i, beam] = text.tokens_T[-1]
        return tokens.reshape(-1, 1)

    def asked(self, width: int) -> Ids:
        """The tokens that lead each row on, (rows, ways), the rest filled with zeros."""
        asked = np.zeros((len(self.beams), width, self.ways), np.int32)
        for i, beams in enumerate(self.beams):
            assert isinstance(beams, ConstrainedBeams)
            for beam, tokens in enumerate(beams.next_tokens()):
                asked[i, beam, : len(tokens)] = tokens
        return asked.reshape(-1, self.ways)

    def advance(self, found: Arrays) -> None:
        """Go on with what a step has selected: arrays (prompts, groups, continuations)."""
        totals, places, tokens = (found[name].reshape(len(self.beams), -1) for name in ("totals", "beams", "tokens"))
        totals = totals.astype(np.float64)
        for i, beams in enumerate(self.beams):
            if beams.done:
                continue
            candidates = Candidates(totals_C=totals[i], beams_C=places[i], tokens_C=tokens[i])
            if isinstance(beams, ConstrainedBeams):
                asked = found["asked"].reshape(len(self.beams), -1, self.ways)[i]
                beams.advance(candidates, _asked(beams, asked))
            else:
                beams.advance(candidates)

    def stuck(self) -> npt.NDArray[np.bool_]:
        """Which prompts, (B,), have beams that can't go on and no text that has ended."""
        stuck = np.array([beams.done and not beams.results() for beams in self.beams])
        return np.asarray(stuck.reshape(len(self.prompt.input_ids), -1).all(1))

    def generated(self) -> Generated:
        """The best texts of each prompt."""
        settings = self.settings
        count, groups, penalty = settings.num_return_sequences, settings.num_beam_groups, settings.length_penalty
        chosen: list[tuple[int, Hypothesis]] = []
        for prompt in range(len(self.prompt.input_ids)):
            numbers = range(prompt * groups, (prompt + 1) * groups)
            texts = [(i, text) for i in numbers for text in self.beams[i].results()]
            if groups > 1:
                texts.sort(key=lambda pair: -pair[1].score(penalty))
            if len(texts) < count:
                raise GenerationError(
                    f"num_return_sequences is {count}, but prompt {prompt} has {len(texts)} continuations of "
                    f"at most {self.prompt.new_tokens} tokens that the settings allow. Ask for fewer or longer ones."
                )
            chosen += texts[:count]
        shape = len(chosen), max(len(text.tokens_T) for _, text in chosen)
        new_ids, rows = np.full(shape, self.settings.padding), np.full(shape, -1)
        logprobs, scores = np.zeros(shape), np.array([text.score(penalty) for _, text in chosen])
        for place, (i, text) in enumerate(chosen):
            length = len(text.tokens_T)
            new_ids[place, :length] = self.closed(text.tokens_T)
            rows[place, :length] = i * self.width + text.beams_T
            logprobs[place, :length] = np.diff(text.totals_T, prepend=0)
        return Generated(new_ids=new_ids, token_logprobs=logprobs, sequences_scores=scores, beam_indices=rows)

    def closed(self, tokens_T: Ids) -> Ids:
        """A text as it comes back. In groups the first end-of-text id stands for all, as with Hugging Face."""
        ends = self.settings.eos_token_id
        if self.settings.num_beam_groups > 1 and tokens_T[-1] in ends:
            return np.append(tokens_T[:-1], ends[0])
        return tokens_T


def _asked(beams: ConstrainedBeams, totals_KA: Totals) -> Candidates:
    """The continuations that lead on with the constraints."""
    ways = [(beam, way, token) for beam, tokens in enumerate(beams.next_tokens()) for way, token in enumerate(tokens)]
    return Candidates(
        totals_C=np.array([totals_KA[beam, way] for beam, way, _ in ways], np.float64),
        beams_C=np.array([beam for beam, _, _ in ways], np.int64),
        tokens_C=np.array([token for _, _, token in ways], np.int64),
    )
