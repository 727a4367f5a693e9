"""`opt-convert doctor`: each known-bad state is made, and named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conversion import cli, convert, open_checkpoint
from conversion.doctor import EXPECTED, NOTE, PROBLEM, doctor
from conversion.formats import safetensors_file
from conversion.tensors import TensorInfo, TensorSpec
from opt_common.config import OPTConfig
from opt_common.hub import resolve
from tests.cases import SMALL_VARIANTS, formats
from tests.paths import GOLDENS

PRE_LN = GOLDENS / "pre_ln/safetensors"
TABLE = "model.decoder.embed_tokens.weight"
NORM = "model.decoder.final_layer_norm"
Arrays = dict[str, np.ndarray]


def remake(target: Path, source: Path, change: Callable[[Arrays], Any] = lambda _: None, **config: Any) -> Path:
    """A checkpoint with its tensors and its configuration changed at will."""
    with open_checkpoint(source) as checkpoint:
        arrays = {name: checkpoint.read(name) for name in checkpoint.names}
        changed = checkpoint.config.to_dict() | config
    change(arrays)
    target.mkdir(exist_ok=True)
    specs = [TensorSpec(name=name, info=TensorInfo(array.dtype, array.shape)) for name, array in arrays.items()]
    (target / "model.safetensors").unlink(missing_ok=True)
    safetensors_file.write(target / "model.safetensors", specs, arrays.__getitem__)
    (target / "config.json").write_text(json.dumps(changed))
    return target


def states(path: Path) -> list[tuple[str, str]]:
    return [(finding.state, finding.severity) for finding in doctor(path).findings]


@pytest.mark.parametrize("variant", SMALL_VARIANTS)
def test_nothing_is_found_where_nothing_is_wrong(variant: str):
    for folder in formats(variant):
        assert states(GOLDENS / variant / folder) == []


def test_the_bundled_model_is_healthy():
    assert states(resolve("opt-tiny")) == []


def test_row_6_a_pre_norm_model_without_its_final_norm(tmp_path: Path):
    def old(arrays: Arrays) -> None:
        del arrays[f"{NORM}.weight"], arrays[f"{NORM}.bias"]

    source = remake(tmp_path / "a", PRE_LN, old)
    assert states(source) == [("no-final-norm", PROBLEM)]
    assert "June 2022" in doctor(source).findings[0].what
    assert states(remake(tmp_path / "b", source, _remove_final_layer_norm=True)) == []


def test_rows_7_and_8_flags_that_do_not_fit_the_tensors(tmp_path: Path):
    small = remake(tmp_path / "a", GOLDENS / "post_ln_proj/safetensors", do_layer_norm_before=True)
    assert states(small) == [("norm-flags", PROBLEM)]
    assert doctor(small).findings[0].remedy == 'Set "do_layer_norm_before": false.'
    post = remake(tmp_path / "b", PRE_LN, do_layer_norm_before=False)
    assert doctor(post).findings[0].remedy == 'Set "do_layer_norm_before": true.'
    removed = remake(tmp_path / "c", PRE_LN, _remove_final_layer_norm=True)
    assert doctor(removed).findings[0].remedy == 'Set "_remove_final_layer_norm": false.'


def test_rows_9_and_10_names_that_others_do_not_find(tmp_path: Path):
    def only_head(arrays: Arrays) -> None:
        arrays["lm_head.weight"] = arrays.pop(TABLE)

    def without_prefix(arrays: Arrays) -> None:
        for name in list(arrays):
            arrays[name.removeprefix("model.")] = arrays.pop(name)

    assert states(remake(tmp_path / "a", PRE_LN, only_head)) == [("lm-head-only", PROBLEM)]
    assert states(remake(tmp_path / "b", PRE_LN, without_prefix)) == [("no-prefix", NOTE)]
    convert(tmp_path / "b", tmp_path / "c", "safetensors")
    assert states(tmp_path / "c") == []


def test_vocabularies_of_50265_and_50272(tmp_path: Path):
    def rows(count: int) -> Callable[[Arrays], None]:
        def change(arrays: Arrays) -> None:
            arrays[TABLE] = np.resize(arrays[TABLE], (count, arrays[TABLE].shape[1]))

        return change

    unpadded = remake(tmp_path / "a", PRE_LN, rows(50265), vocab_size=50272)
    assert states(unpadded) == [("vocabulary", PROBLEM)]
    assert 'Set "vocab_size": 50265' in doctor(unpadded).findings[0].remedy
    assert states(remake(tmp_path / "b", PRE_LN, rows(50265), vocab_size=50265)) == [("vocabulary", NOTE)]
    assert states(remake(tmp_path / "c", PRE_LN, rows(50272), vocab_size=50272)) == []


def test_two_formats_that_disagree(tmp_path: Path):
    convert(PRE_LN, tmp_path / "a", "torch")
    remake(tmp_path / "a", PRE_LN)
    assert doctor(tmp_path / "a").formats == ("safetensors", "torch")
    assert states(tmp_path / "a") == []
    remake(tmp_path / "a", PRE_LN, lambda arrays: arrays.update({TABLE: arrays[TABLE] + 1}))
    assert states(tmp_path / "a") == [("formats-disagree", PROBLEM)]
    assert TABLE in doctor(tmp_path / "a").findings[0].what


def test_a_tokenizer_without_the_prefix(tmp_path: Path):
    source = resolve("opt-tiny")
    for name in ("a", "b", "c"):
        shutil.copytree(source, tmp_path / name)
    settings = json.loads((source / "tokenizer_config.json").read_text()) | {"add_bos_token": False}
    (tmp_path / "a/tokenizer_config.json").write_text(json.dumps(settings))
    assert states(tmp_path / "a") == [("no-tokenizer-prefix", PROBLEM)]
    fast = json.loads((source / "tokenizer.json").read_text()) | {"post_processor": None}
    (tmp_path / "b/tokenizer.json").write_text(json.dumps(fast))
    (tmp_path / "b/tokenizer_config.json").unlink()
    assert states(tmp_path / "b") == [("no-tokenizer-prefix", PROBLEM)]
    remake(tmp_path / "c", PRE_LN)
    assert states(tmp_path / "c") == [("vocabulary", PROBLEM)], "more tokens than rows"


def test_row_19_numbers_that_float16_cannot_hold(tmp_path: Path):
    def spoil(value: float) -> Callable[[Arrays], None]:
        def change(arrays: Arrays) -> None:
            arrays[f"{NORM}.bias"] = np.where(np.arange(32) == 5, value, arrays[f"{NORM}.bias"]).astype(np.float32)

        return change

    assert states(remake(tmp_path / "a", PRE_LN, spoil(-70000))) == [("float16-overflow", NOTE)]
    assert states(remake(tmp_path / "b", PRE_LN, spoil(np.inf))) == [("not-finite", PROBLEM)]
    assert states(remake(tmp_path / "c", PRE_LN, spoil(np.nan))) == [("not-finite", PROBLEM)]


def test_row_19_hidden_states_that_float16_cannot_hold(tmp_path: Path):
    def loud(arrays: Arrays) -> None:
        arrays["model.decoder.layers.1.fc2.bias"] = np.full(32, 40_000, np.float32)
        arrays["model.decoder.layers.0.fc2.bias"] = np.full(32, 40_000, np.float32)

    source = remake(tmp_path / "a", PRE_LN, loud)
    assert states(source) == [("float16-overflow", NOTE)]
    assert "first at layer 1;" in doctor(source).findings[0].what


def test_row_16_norms_of_one_are_expected(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """transformers#24243: it looks like an initialised model and is how most of OPT was trained."""

    def ones(arrays: Arrays) -> None:
        for name in arrays:
            if name.endswith("layer_norm.weight"):
                arrays[name] = np.ones_like(arrays[name])

    source = remake(tmp_path / "a", PRE_LN, ones)
    assert states(source) == [("norms-of-one", EXPECTED)]
    assert doctor(source).healthy
    assert cli.main(["doctor", str(source)]) == 0
    out = capsys.readouterr().out
    assert "expected norms-of-one: The weight of every layer norm is exactly 1" in out
    assert out.endswith("0 problems\n")

    def nearly(arrays: Arrays) -> None:
        ones(arrays)
        arrays[f"{NORM}.weight"][3] = np.nextafter(np.float32(1), np.float32(2))

    assert states(remake(tmp_path / "b", PRE_LN, nearly)) == []


def test_what_cannot_be_read_is_a_finding(tmp_path: Path):
    assert states(tmp_path) == [("unreadable", PROBLEM)]
    (tmp_path / "config.json").write_text(OPTConfig().to_json())
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    assert states(tmp_path) == [("unreadable", PROBLEM)]
    missing = remake(tmp_path / "a", PRE_LN, lambda arrays: arrays.pop("model.decoder.layers.1.fc1.bias"))
    assert "missing: model.decoder.layers.1.fc1.bias" in doctor(missing).findings[0].what


def test_metaseq_is_looked_at_too(tmp_path: Path):
    convert(PRE_LN, tmp_path / "a", "metaseq", model_parts=2)
    assert doctor(tmp_path / "a").formats == ("metaseq",)
    assert states(tmp_path / "a") == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["doctor", str(PRE_LN)]) == 0
    assert capsys.readouterr().out.endswith("nothing known to be bad was found\n")
    bad = str(remake(tmp_path / "a", PRE_LN, do_layer_norm_before=False))
    assert cli.main(["doctor", bad]) == 3
    out = capsys.readouterr().out
    assert "problem norm-flags: The decoder has a final_layer_norm" in out
    assert f"where  {bad}" in out
    assert out.endswith("1 problem\n")
    assert cli.main(["doctor", bad, "--json"]) == 3
    assert not json.loads(capsys.readouterr().out)["healthy"]
    assert cli.main(["doctor", str(tmp_path / "absent")]) == 1
