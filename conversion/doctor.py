"""What is known to be wrong with OPT checkpoints that are about, looked for in one directory.

Each state has cost users of other software time: a norm that is absent, a head without its table, a flag that does not
fit the tensors. A finding says what it is, where, and what to do.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from conversion.canonical import EMBEDDING
from conversion.checkpoint import Checkpoint, checked_parameters, open_checkpoint
from conversion.convert import locate
from conversion.dtypes import BY_NUMPY
from conversion.function import hidden_states, inputs_for, part_name
from conversion.tensors import Array, fetch, pieces
from conversion.verify import LARGEST_FUNCTION, verify
from opt_common.config import OPTConfig
from opt_common.errors import OPTError
from opt_common.hub import METASEQ, WEIGHT_FILES
from opt_common.json_file import read_json
from opt_common.native_files import home_of
from opt_common.params import count_parameters, parameter_table
from opt_common.quantization import storage_problem
from opt_common.tokenizer import OPTTokenizer

PROBLEM, NOTE, EXPECTED = "problem", "note", "expected"
"""How bad a finding is: a problem gives wrong results or none, here or in other software; a note is good to know; what
is expected looks like damage and is none."""

_FINAL_NORM = "model.decoder.final_layer_norm.weight"
_OPT_BOS = 2
_OPT_TOKENS, _OPT_ROWS = 50265, 50272
_LARGEST_HALF = float(np.finfo(np.float16).max)
_SHOWN = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is known to be bad.

    Attributes:
        state: a short name that stays the same, for machines.
        severity: `PROBLEM`, `NOTE` or `EXPECTED`.
        what: what is the matter.
        where: the file or directory.
        remedy: what to do.
    """

    state: str
    severity: str
    what: str
    where: str
    remedy: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Result of `doctor`: what was looked at, its weights by format, and all findings, problems first."""

    source: str
    formats: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether no finding is a problem."""
        return all(finding.severity != PROBLEM for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {"healthy": self.healthy, **dataclasses.asdict(self)}


def doctor(src: str | os.PathLike[str], *, config: str | os.PathLike[str] | None = None, **hub: Any) -> Diagnosis:
    """Look for known-bad states. All weights are read once, those in further formats twice.

    Args:
        src: a directory, a weight file, or a hub id.
        config: a configuration file to use in place of the one beside the weights.
        **hub: arguments of `opt_common.hub.resolve`.

    Raises:
        CheckpointError: if there is no such directory. Whatever is wrong inside it is a finding.
    """
    path = Path(src)
    # A directory is taken as it is: `resolve` would refuse a broken one, and that is what this is for.
    source = path if path.is_dir() else locate(src, config=config, **hub)
    directory = home_of(source)
    findings: list[Finding] = []
    opened: dict[str, Path] = {}
    embedding_rows: int | None = None
    stated: OPTConfig | None = None
    for weights in _weights(source):
        try:
            with open_checkpoint(weights, config=config) as checkpoint:
                opened[checkpoint.format] = weights
                stated = checkpoint.config
                findings += _checkpoint_findings(checkpoint, str(weights))
                if EMBEDDING in checkpoint.names:
                    embedding_rows = checkpoint.info(EMBEDDING).shape[0]
        except OPTError as error:
            findings.append(_unreadable(str(weights), error))
    findings += _disagreements(list(opened.values()), config)
    if stated is not None:
        findings += _tokenizer_findings(directory, stated, embedding_rows)
    return Diagnosis(
        source=os.fspath(src),
        formats=tuple(opened),
        findings=tuple(sorted(findings, key=lambda finding: finding.severity != PROBLEM)),
    )


def _unreadable(where: str, error: OPTError) -> Finding:
    return Finding(
        state="unreadable",
        severity=PROBLEM,
        what=str(error),
        where=where,
        remedy="Do as it says, and look again.",
    )


def _weights(source: Path) -> list[Path]:
    """A path for each format of weights in a directory, in the order of preference; for metaseq the directory."""
    if source.is_file():
        return [source]
    found = [
        next((source / name for name in (files.single, files.index) if (source / name).is_file()), None)
        for files in WEIGHT_FILES.values()
    ]
    # Without any, opening the directory says what is missing.
    return [path for path in found if path is not None] or [source]


# One checkpoint


def _checkpoint_findings(checkpoint: Checkpoint, where: str) -> Iterator[Finding]:
    stories = [*_norm_findings(checkpoint, where), *_vocabulary_findings(checkpoint, where)]
    yield from stories
    fits = not stories
    if not stories:
        try:
            checked_parameters(checkpoint, parameter_table(checkpoint.config, head=checkpoint.head))
        except OPTError as error:
            fits = False
            yield _unreadable(where, error)
    yield from _name_findings(checkpoint, where)
    yield from _quantization_findings(checkpoint, where)
    numbers = list(_number_findings(checkpoint, where))
    yield from numbers
    if fits and all(finding.state == "norms-of-one" for finding in numbers):
        yield from _activation_findings(checkpoint, where)


def _norm_findings(checkpoint: Checkpoint, where: str) -> Iterator[Finding]:
    """The decoder's final norm and the flags that say whether there is one."""
    config = checkpoint.config
    held = _FINAL_NORM in checkpoint.names
    if not config.layer_norm_elementwise_affine or held == config.has_final_layer_norm:
        return
    if held:
        flag = "_remove_final_layer_norm" if config.do_layer_norm_before else "do_layer_norm_before"
        value, right = ("true", "false") if config.do_layer_norm_before else ("false", "true")
        what = f"The decoder has a final_layer_norm, but the configuration says {flag}: {value}, so that it has none."
        yield _finding("norm-flags", what, where, f'Set "{flag}": {right}.')
    elif config.has_projection:
        what = (
            "The decoder has projections and no final_layer_norm, as OPT-350m, which is post-norm; "
            "the configuration says do_layer_norm_before: true."
        )
        yield _finding("norm-flags", what, where, 'Set "do_layer_norm_before": false.')
    else:
        what = (
            "The decoder's final_layer_norm is absent from a pre-norm model, as in checkpoints of transformers before "
            "4.20.1 (June 2022), whose text is gibberish."
        )
        remedy = (
            'Fetch a newer checkpoint. If the model was trained without the norm, set "_remove_final_layer_norm": true.'
        )
        yield _finding("no-final-norm", what, where, remedy)


def _vocabulary_findings(checkpoint: Checkpoint, where: str) -> Iterator[Finding]:
    if EMBEDDING not in checkpoint.names:
        return
    rows, stated = checkpoint.info(EMBEDDING).shape[0], checkpoint.config.vocab_size
    if rows != stated:
        what = f"The token table has {rows} rows, but the configuration says vocab_size {stated}."
        if {rows, stated} == {_OPT_TOKENS, _OPT_ROWS}:
            what += f" OPT's tokenizer has {_OPT_TOKENS} tokens, its published tables are padded to {_OPT_ROWS} rows."
        yield _finding("vocabulary", what, where, f'Set "vocab_size": {rows}.')
    elif rows == _OPT_TOKENS:
        what = f"The token table has {rows} rows, one for each token; published OPT models have {_OPT_ROWS}."
        remedy = "Nothing here. Software that expects the published shape wants the table padded with rows of zeros."
        yield _finding("vocabulary", what, where, remedy, NOTE)


def _name_findings(checkpoint: Checkpoint, where: str) -> Iterator[Finding]:
    if checkpoint.format == METASEQ or EMBEDDING not in checkpoint.names:
        return
    rewrite = f"`opt-convert convert {where} NEW --to {checkpoint.format}` writes it as it should be."
    if "lm_head" in checkpoint.native_name(EMBEDDING):
        what = "The token table is stored as lm_head.weight only; other software finds no embeddings."
        yield _finding("lm-head-only", what, where, rewrite)
    elif checkpoint.scheme == "torch" and checkpoint.head is not None:
        natives = [checkpoint.native_name(name) for name in checkpoint.names]
        if not any(native.startswith("model.") for native in natives):
            what = f"The names lack the prefix 'model.' ({natives[0]}); some other software finds no tensors."
            yield _finding("no-prefix", what, where, rewrite, NOTE)


def _quantization_findings(checkpoint: Checkpoint, where: str) -> Iterator[Finding]:
    if checkpoint.storage is None:
        return
    if problem := storage_problem(checkpoint.config, checkpoint.storage):
        yield _finding("quantization", problem, where, 'Set "quantization" in config.json to what it says.')
    what = f"The matrices are integers ({checkpoint.storage}), which only this package reads."
    remedy = f"For other software: `opt-convert convert {where} NEW --to safetensors --dequantize`."
    yield _finding("quantized", what, where, remedy, NOTE)


def _number_findings(checkpoint: Checkpoint, where: str) -> Iterator[Finding]:
    """Numbers that are none, and such as float16 can't hold."""
    broken: list[str] = []
    wide: list[str] = []
    norms: list[bool] = []
    for name in checkpoint.names:
        array = checkpoint.read(name)
        if not BY_NUMPY[array.dtype].floating:
            continue
        peak = _peak(name, array)
        if not np.isfinite(peak):
            broken.append(name)
        elif peak > _LARGEST_HALF:
            wide.append(name)
        if name.endswith("layer_norm.weight"):
            norms.append(bool((fetch(array) == 1).all()))
    if broken:
        what = f"Not all numbers are finite in {_listed(broken)}."
        remedy = "Fetch the checkpoint again, or convert the original to a wider dtype such as bfloat16."
        yield _finding("not-finite", what, where, remedy)
    if wide:
        what = f"Numbers beyond float16's {_LARGEST_HALF:g} are in {_listed(wide)}; in float16 they become infinite."
        yield _finding("float16-overflow", what, where, "Use bfloat16 or float32.", NOTE)
    if norms and all(norms):
        what = (
            "The weight of every layer norm is exactly 1, as in published OPT-125m, 1.3b and larger: so they were "
            "trained, and nothing was lost."
        )
        yield _finding("norms-of-one", what, where, "Nothing.", EXPECTED)


def _activation_findings(checkpoint: Checkpoint, where: str) -> Iterator[Finding]:
    """Hidden states that float16 can't hold, of a model that is small enough to be computed here."""
    if count_parameters(checkpoint.config) > LARGEST_FUNCTION:
        return
    with np.errstate(all="ignore"):
        states = hidden_states(checkpoint, inputs_for(checkpoint.config, None))
        peaks = [float(np.abs(state).max(initial=0.0)) for state in states]
    first = next((index for index, peak in enumerate(peaks) if not peak <= _LARGEST_HALF), None)
    if first is not None:
        what = (
            f"Hidden states go beyond float16's {_LARGEST_HALF:g} (up to {max(peaks):.3g}), first at "
            f"{part_name(first, len(peaks))}; computed in float16 they become infinite."
        )
        yield _finding("float16-overflow", what, where, "Compute in bfloat16 or float32.", NOTE)


def _peak(name: str, array: Array) -> float:
    """Largest magnitude in an array; not finite if one of its numbers is not."""
    with np.errstate(invalid="ignore"):  # of NaNs that signal
        peaks = [float(np.abs(piece).astype(np.float64).max(initial=0.0)) for piece in pieces(array, array.dtype, name)]
    return float(np.max([0.0, *peaks]))  # unlike Python's max, it lets NaN through


# Several formats, and the tokenizer


def _disagreements(paths: list[Path], config: str | os.PathLike[str] | None) -> Iterator[Finding]:
    """Weights in a second format that are not those of the first."""
    for other in paths[1:]:
        try:
            result = verify(paths[0], other, function=False, config=config)
        except OPTError as error:
            yield _unreadable(str(other), error)
            continue
        if different := [check.name for check in result.checks if check.verdict == "differs"]:
            what = f"{other.name} and {paths[0].name} hold different models: {_listed(different)}."
            remedy = f"Find out which is meant ({paths[0].name} is the one that is loaded), and remove the other."
            yield _finding("formats-disagree", what, str(other.parent), remedy)


def _tokenizer_findings(directory: Path, config: OPTConfig, rows: int | None) -> Iterator[Finding]:
    if not any((directory / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        return
    try:
        tokenizer = OPTTokenizer.from_pretrained(directory)
        first = tokenizer.encode("a")[0]
    except OPTError as error:
        yield _unreadable(str(directory), error)
        return
    # Galactica, whose start token is another, was trained without one in front.
    if config.bos_token_id == _OPT_BOS:
        slow = directory / "tokenizer_config.json"
        remedy = 'Set "add_bos_token": true in tokenizer_config.json, and remove a tokenizer.json that lacks it.'
        if first != _OPT_BOS:
            what = "The tokenizer puts no </s> in front of a text, as OPT was trained to have it."
            yield _finding("no-tokenizer-prefix", what, str(directory), remedy)
        elif (directory / "vocab.json").is_file() and slow.is_file() and _object(slow).get("add_bos_token") is not True:
            what = "transformers' slow tokenizer puts no </s> in front of a text here (add_bos_token is not true)."
            yield _finding("no-tokenizer-prefix", what, str(slow), remedy)
    if rows is not None and len(tokenizer) > rows:
        what = f"The tokenizer has {len(tokenizer)} tokens, the token table {rows} rows; the last tokens have none."
        remedy = "Use the tokenizer that the model was trained with, or resize the table."
        yield _finding("vocabulary", what, str(directory), remedy)


def _object(path: Path) -> dict[str, Any]:
    """A JSON object that the tokenizer has read before."""
    content: Any = read_json(path)
    return cast("dict[str, Any]", content) if isinstance(content, dict) else {}


def _finding(state: str, what: str, where: str, remedy: str, severity: str = PROBLEM) -> Finding:
    return Finding(state=state, severity=severity, what=what, where=where, remedy=remedy)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
