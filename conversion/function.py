"""What a model computes: the same ids through two checkpoints, or through the NumPy reference and a framework.

Everything is float64, so that what differs is a mistake and no rounding. The reference computes here; a framework
computes in a process of its own, in which its program (`opt_torch.cli`, …) loads the checkpoint as a user would.
"""

import dataclasses
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from conversion.canonical import EMBEDDING, HEAD
from conversion.checkpoint import Checkpoint
from conversion.tensors import Array, contiguous
from opt_common.config import OPTConfig
from opt_common.errors import CheckpointError, MissingFrameworkError, OPTError
from opt_common.params import ARCHITECTURES
from opt_common.reference import answer, classify, decode, forward, generate_greedy
from opt_common.tokenizer import OPTTokenizer

REFERENCE = "reference"

FRAMEWORKS: Mapping[str, tuple[str, str]] = {
    "torch": ("opt_torch.cli", "torch"),
    "tf": ("opt_tf.cli", "tensorflow"),
    "flax": ("opt_flax.cli", "flax"),
}
"""Framework -> the module of its program, and the module by which it is seen to be installed."""

TOLERANCE = 1e-9
"""Largest difference between a framework and the reference in float64, relative to the largest number if that is above
one. The backends agree with the reference to 1e-10."""

_SEED = 0
_BATCH, _LENGTH, _NEW_TOKENS = 2, 16, 8
_PROMPTS = ("Once upon a time, there was", "The")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FunctionCheck:
    """How two runs on the same seeded ids compare, of which the second row is padded on the left; float64.

    Attributes:
        checkpoint: what was computed.
        framework: what computed it: "reference", "torch", "tf" or "flax".
        against: the other run: another checkpoint in the reference, or this checkpoint in the reference.
        hidden_states: max |difference| over attended positions, for the embeddings, each layer's output and the last
            hidden state, which is that of the last layer after the final norm and projection.
        tolerance: largest difference of each hidden state that still counts as none.
        first_divergent: index in `hidden_states` of the first that differs, or None.
        first_layer: name of the first part of the model that differs, or None.
        logits: max |difference| of the logits over attended positions; of a sequence classifier, over rows.
        top1_agreement: share of attended positions with the same likeliest token; of a sequence classifier, share of
            rows with the same highest logit; of question answering, share of ends of the same answer.
        greedy_equal: whether both continue the prompts with the same tokens; true if they are no language models.
        greedy: the tokens of this run, one row for each prompt; empty without a language model.
        text: the same as text with the prompts in front, where the checkpoint has a tokenizer.
    """

    checkpoint: str
    framework: str
    against: str
    hidden_states: tuple[float, ...]
    tolerance: float
    first_divergent: int | None
    first_layer: str | None
    logits: float
    top1_agreement: float
    greedy_equal: bool
    greedy: tuple[tuple[int, ...], ...]
    text: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether both compute the same."""
        return self.first_divergent is None and self.logits <= self.tolerance and self.greedy_equal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is computed with.

    Attributes:
        ids: (B, T) seeded ids.
        mask: (B, T); the second row begins with padding.
        prompt: (B, S) ids to continue: two texts, where there is a tokenizer for them.
        prompt_mask: (B, S).
        steps: tokens to append.
    """

    ids: Array
    mask: Array
    prompt: Array
    prompt_mask: Array
    steps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What one checkpoint computes; the shapes are those of the class of the model.

    Attributes:
        hidden_states: of attended positions, (positions, D or E).
        logits: of attended positions (positions, V), rows (B, C), or both ends of an answer (2, positions).
        tops: where the highest logits are.
        greedy: (B, steps) appended tokens; None if it is no language model.
    """

    hidden_states: tuple[Array, ...]
    logits: Array
    tops: Array
    greedy: Array | None


def is_installed(framework: str) -> bool:
    """Whether a framework, and this package's backend for it, can be imported; nothing is."""
    program, module = FRAMEWORKS[framework]
    return all(importlib.util.find_spec(name) is not None for name in (program.partition(".")[0], module))


def computes(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has a head to compute logits with."""
    return checkpoint.head not in ("lm", None) or source_of(checkpoint, HEAD) is not None


def source_of(checkpoint: Checkpoint, name: str) -> str | None:
    """Under which name a checkpoint holds a tensor; a tied head is the token table."""
    if name in checkpoint.names:
        return name
    return EMBEDDING if name == HEAD and checkpoint.config.tie_word_embeddings else None


def inputs_for(config: OPTConfig, tokenizer: OPTTokenizer | None) -> Inputs:
    """The ids for a model; the same for the same configuration and tokenizer."""
    length = min(_LENGTH, config.max_position_embeddings)
    ids_BT = np.random.default_rng(_SEED).integers(0, config.vocab_size, (_BATCH, length))
    mask_BT = np.ones_like(ids_BT)
    mask_BT[1, : length // 4] = 0
    prompt_BS, prompt_mask_BS = ids_BT, mask_BT
    if tokenizer is not None and len(tokenizer) <= config.vocab_size:
        encoded = tokenizer(list(_PROMPTS), padding=True, return_tensors="np")
        if encoded["input_ids"].shape[1] <= length:
            prompt_BS, prompt_mask_BS = encoded["input_ids"], encoded["attention_mask"]
    steps = min(_NEW_TOKENS, config.max_position_embeddings - prompt_BS.shape[1])
    return Inputs(ids=ids_BT, mask=mask_BT, prompt=prompt_BS, prompt_mask=prompt_mask_BS, steps=steps)


def tokenizer_of(path: Path) -> OPTTokenizer | None:
    """The tokenizer beside a checkpoint's weights; None where there is none that can be used."""
    directory = path if path.is_dir() else path.parent
    try:
        return OPTTokenizer.from_pretrained(directory, padding_side="left")
    except OPTError:
        return None


def run_reference(checkpoint: Checkpoint, inputs: Inputs) -> Run:
    """Compute a checkpoint in the reference."""
    weights = _Lazy(checkpoint)
    config, ids_BT, mask_BT = checkpoint.config, inputs.ids, inputs.mask
    attended_BT = mask_BT.astype(bool)
    if checkpoint.head == "sequence_classification":
        states, _ = decode(config, weights, ids_BT, mask_BT)
        return _classified(states, classify(config, weights, ids_BT, mask_BT).logits, attended_BT)
    if checkpoint.head == "question_answering":
        states, _ = decode(config, weights, ids_BT, mask_BT)
        found = answer(config, weights, ids_BT, mask_BT)
        return _answered(states, found.start_logits, found.end_logits, attended_BT)
    output = forward(config, weights, ids_BT, mask_BT)
    greedy = generate_greedy(config, weights, inputs.prompt, inputs.prompt_mask, inputs.steps)
    return _continued(output.hidden_states, output.logits, greedy[:, inputs.prompt.shape[1] :], attended_BT)


def hidden_states(checkpoint: Checkpoint, inputs: Inputs) -> tuple[Array, ...]:
    """The hidden states of a checkpoint in the reference, at attended positions."""
    states, _ = decode(checkpoint.config, _Lazy(checkpoint), inputs.ids, inputs.mask)
    return _attended(states, inputs.mask.astype(bool))


def run_framework(framework: str, directory: Path, checkpoint: Checkpoint, inputs: Inputs) -> Run:
    """Compute a checkpoint in a framework, in a process of its own.

    Args:
        framework: a key of `FRAMEWORKS`.
        directory: the checkpoint as a user would name it.
        checkpoint: the same, open.
        inputs: what to compute with.

    Raises:
        MissingFrameworkError: if it is not installed.
        CheckpointError: if it doesn't load the checkpoint; the error says what its program said.
    """
    if not is_installed(framework):
        raise MissingFrameworkError(f"{framework} is not installed: pip install 'opt-models[{framework}]'.")
    with tempfile.TemporaryDirectory() as place:
        given, made = Path(place) / "inputs.npz", Path(place) / "outputs.npz"
        np.savez(given, **dataclasses.asdict(inputs))
        program = f"import sys; from {FRAMEWORKS[framework][0]} import main; sys.exit(main())"
        command = [sys.executable, "-c", program, "states", str(directory), str(given), str(made)]
        command += ["--architecture", ARCHITECTURES[checkpoint.head or "lm"]]
        # JAX has float64 off unless it is told so before it starts.
        environment = {**os.environ, "JAX_ENABLE_X64": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode != 0:
            said = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
            raise CheckpointError(f"{directory} can't be computed in {framework}: {said}")
        with np.load(made) as held:
            outputs = {name: held[name] for name in held.files}
    states = tuple(outputs[f"hidden_states.{index}"] for index in range(checkpoint.config.num_hidden_layers + 1))
    attended_BT = inputs.mask.astype(bool)
    if checkpoint.head == "sequence_classification":
        return _classified(states, outputs["logits"], attended_BT)
    if checkpoint.head == "question_answering":
        return _answered(states, outputs["start_logits"], outputs["end_logits"], attended_BT)
    return _continued(states, outputs["logits"], outputs["greedy"], attended_BT)


def compare(
    a: Run, b: Run, *, names: tuple[str, str, str], tolerance: float, inputs: Inputs, tokenizer: OPTTokenizer | None
) -> FunctionCheck:
    """Compare a run with another one.

    Args:
        a: the run that is checked.
        b: the run that it is held against.
        names: `checkpoint`, `framework` and `against` of the result.
        tolerance: largest difference that counts as none, for numbers up to one.
        inputs: what both were computed with.
        tokenizer: makes text of tokens.
    """
    differences = tuple(difference(x, y) for x, y in zip(a.hidden_states, b.hidden_states, strict=True))
    scale = max(1.0, *(float(np.abs(state).max(initial=0.0)) for state in (*b.hidden_states, b.logits)))
    allowed = tolerance * scale
    first = next((index for index, value in enumerate(differences) if not value <= allowed), None)
    greedy: tuple[tuple[int, ...], ...] = ()
    text: tuple[str, ...] = ()
    if a.greedy is not None:
        greedy = tuple(tuple(int(token) for token in row) for row in a.greedy)
        if tokenizer is not None and inputs.prompt is not inputs.ids:
            whole = np.concatenate([inputs.prompt, a.greedy], axis=1)
            text = tuple(tokenizer.batch_decode(whole, skip_special_tokens=True))
    return FunctionCheck(
        checkpoint=names[0],
        framework=names[1],
        against=names[2],
        hidden_states=differences,
        tolerance=allowed,
        first_divergent=first,
        first_layer=None if first is None else part_name(first, len(differences)),
        logits=difference(a.logits, b.logits),
        top1_agreement=float((a.tops == b.tops).mean()),
        greedy_equal=a.greedy is None or b.greedy is None or bool(np.array_equal(a.greedy, b.greedy)),
        greedy=greedy,
        text=text,
    )


def last_layer_differs(ours: Checkpoint, theirs: Checkpoint, inputs: Inputs) -> bool:
    """Whether the last layer itself computes something else, in front of the final norm and projection."""
    outputs = [
        decode(checkpoint.config.replace(_remove_final_layer_norm=True), _Bare(checkpoint), inputs.ids, inputs.mask)[0][
            -1
        ][inputs.mask.astype(bool)]
        for checkpoint in (ours, theirs)
    ]
    return difference(*outputs) > 0


def part_name(index: int, count: int) -> str:
    """What one of the hidden states is the output of: "embeddings", "layer 0", …"""
    if index == 0:
        return "embeddings"
    return f"layer {index - 1}" + (" or final norm" if index == count - 1 else "")


def difference(a: Array, b: Array) -> float:
    """max |a - b|; infinite where one of them is no number."""
    with np.errstate(invalid="ignore"):
        found = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return float(np.where(np.isnan(found), np.inf, found).max(initial=0.0))


def _continued(states: Sequence[Array], logits_BTV: Array, greedy: Array, attended_BT: Array) -> Run:
    logits = logits_BTV[attended_BT]
    return Run(hidden_states=_attended(states, attended_BT), logits=logits, tops=logits.argmax(-1), greedy=greedy)


def _classified(states: Sequence[Array], logits_BC: Array, attended_BT: Array) -> Run:
    tops = logits_BC.argmax(-1)
    return Run(hidden_states=_attended(states, attended_BT), logits=logits_BC, tops=tops, greedy=None)


def _answered(states: Sequence[Array], start_BT: Array, end_BT: Array, attended_BT: Array) -> Run:
    ends_2BT = np.stack([start_BT, end_BT])
    return Run(
        hidden_states=_attended(states, attended_BT),
        logits=ends_2BT[:, attended_BT],
        tops=np.where(attended_BT, ends_2BT, -np.inf).argmax(-1),
        greedy=None,
    )


def _attended(states: Sequence[Array], attended_BT: Array) -> tuple[Array, ...]:
    return tuple(state[attended_BT] for state in states)


class _Lazy(Mapping[str, Array]):
    """The tensors of a checkpoint, read when they are asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> Array:
        # One memory layout, whatever the format's: BLAS rounds a transposed matrix differently.
        return contiguous(self._checkpoint.read(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.names)

    def __len__(self) -> int:
        return len(self._checkpoint.names)

    def __contains__(self, name: object) -> bool:
        return name in self._checkpoint.names


class _Bare(_Lazy):
    """The same without the projection behind the last layer."""

    def __getitem__(self, name: str) -> Array:
        if name == "model.decoder.project_out.weight":
            return np.eye(self._checkpoint.config.hidden_size)
        return super().__getitem__(name)
