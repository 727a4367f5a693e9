"""`opt-convert verify`: digests, the first layer that differs, the frameworks, what people and machines are told."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conversion import cli, convert, open_checkpoint, save_checkpoint, verify
from conversion import function as function_module
from conversion.digests import saved_digests
from conversion.function import FRAMEWORKS, TOLERANCE, run_reference
from conversion.verify import ALL
from opt_common.errors import CheckpointError, MissingFrameworkError
from opt_common.hub import resolve
from opt_common.params import Head, parameter_table
from tests import wrong_program
from tests.adapters import BACKENDS
from tests.paths import GOLDENS, ROOT
from tests.test_doctor import remake

verify_module = sys.modules["conversion.verify"]  # its name is that of the function in it
PRE_LN, POST_LN = GOLDENS / "pre_ln/safetensors", GOLDENS / "post_ln_proj/safetensors"
Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def find_the_package(monkeypatch: pytest.MonkeyPatch):
    """The processes of the frameworks find the package from any directory."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))


def nudged(name: str) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        arrays[name] = (arrays[name] * np.float32(1.01) + np.float32(0.01)).astype(arrays[name].dtype)

    return change


# Which part of the model differs


@pytest.mark.parametrize("source", [PRE_LN, POST_LN], ids=["pre-norm", "post-norm with projections"])
def test_the_layer_of_a_changed_tensor_is_named(tmp_path: Path, source: Path):
    with open_checkpoint(source) as checkpoint:
        layers = checkpoint.config.num_hidden_layers
    tensors = ("self_attn.k_proj.weight", "self_attn.out_proj.bias", "self_attn_layer_norm.weight", "fc1.weight")
    for layer in range(layers):
        for tensor in (*tensors, "fc2.bias", "final_layer_norm.bias"):
            name = f"model.decoder.layers.{layer}.{tensor}"
            result = verify(remake(tmp_path / "a", source, nudged(name)), source)
            assert result.function is not None
            assert result.function.first_layer == f"layer {layer}", name
            assert [check.name for check in result.checks if check.verdict == "differs"] == [name]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.decoder.embed_tokens.weight", "embeddings"),
        ("model.decoder.embed_positions.weight", "embeddings"),
        ("model.decoder.final_layer_norm.weight", "final norm or projection"),
    ],
)
def test_the_part_of_a_changed_tensor_around_the_layers_is_named(tmp_path: Path, name: str, part: str):
    result = verify(remake(tmp_path / "a", PRE_LN, nudged(name)), PRE_LN)
    assert result.function is not None
    assert result.function.first_layer == part


def test_the_projection_behind_the_layers_is_named(tmp_path: Path):
    other = remake(tmp_path / "a", POST_LN, nudged("model.decoder.project_out.weight"))
    result = verify(other, POST_LN)
    assert result.function is not None
    assert result.function.first_layer == "final norm or projection"


# Digests


def test_digests_are_those_of_the_canonical_form(tmp_path: Path):
    digests = [
        verify(GOLDENS / "pre_ln" / folder).digests for folder in ("safetensors", "torch_bin", "tf_h5", "flax_msgpack")
    ]
    assert all(found == digests[0] for found in digests)
    assert len(digests[0]) == 52
    convert(PRE_LN, tmp_path / "parts", "metaseq", model_parts=2)
    assert verify(tmp_path / "parts").digests == digests[0]


def test_a_saved_verification_stands_for_its_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["verify", str(PRE_LN), "--json"]) == 0
    saved = tmp_path / "saved.json"
    saved.write_text(capsys.readouterr().out)
    assert saved_digests(saved) == verify(PRE_LN).digests
    assert verify(GOLDENS / "pre_ln/tf_h5", saved).holds
    name = "model.decoder.layers.1.fc1.bias"
    result = verify(remake(tmp_path / "a", PRE_LN, nudged(name)), saved)
    assert result.problems == (f"{name} differs (float32 and float32): other bits.",)
    half = verify(GOLDENS / "pre_ln/safetensors_fp16", saved)
    assert len(half.problems) == 52
    content = json.loads(saved.read_text())
    del content["digests"][name]
    content["digests"]["more"] = {"dtype": "float32", "shape": [1], "sha256": "0"}
    saved.write_text(json.dumps(content))
    assert verify(PRE_LN, saved).problems == (
        f"{name} is float32 and absent in the two.",
        "more is absent and float32 in the two.",
    )


@pytest.mark.parametrize("content", ["{}", "[]", "x", '{"digests": 3}', '{"digests": {"a": {"shape": [1]}}}'])
def test_a_saved_verification_that_is_none(tmp_path: Path, content: str):
    (tmp_path / "saved.json").write_text(content)
    with pytest.raises(CheckpointError, match="holds no digests"):
        verify(PRE_LN, tmp_path / "saved.json")


# Frameworks


@pytest.fixture(scope="module")
def tiny_with_all(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The bundled model in Flax's format, verified against the original and in every framework."""
    target = tmp_path_factory.mktemp("tiny") / "flax"
    convert(resolve("opt-tiny"), target, "flax")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        return verify(target, frameworks=BACKENDS)


def test_every_framework_computes_what_the_reference_does(tiny_with_all: Any):
    assert tiny_with_all.holds, tiny_with_all.problems
    assert [check.framework for check in tiny_with_all.frameworks] == [name for name in FRAMEWORKS if name in BACKENDS]
    for check in tiny_with_all.frameworks:
        assert max(check.hidden_states) < TOLERANCE
        assert check.logits < TOLERANCE
        assert (check.top1_agreement, check.greedy_equal, check.first_layer) == (1.0, True, None)
        assert check.greedy == tiny_with_all.frameworks[0].greedy
        assert check.text[0].startswith("Once upon a time, there was")


def test_the_layer_at_which_a_framework_differs_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(function_module, "FRAMEWORKS", {**FRAMEWORKS, "torch": ("tests.wrong_program", "torch")})
    code = cli.main(["verify", str(PRE_LN), "--framework", "torch"])
    out = capsys.readouterr().out
    assert code == 3
    assert f"first difference in torch: layer {wrong_program.LAYER}\n" in out
    assert f"torch computes something else than the reference, first at layer {wrong_program.LAYER}" in out
    line = next(line for line in out.splitlines() if line.strip().startswith(f"layer {wrong_program.LAYER}"))
    assert line.endswith("<")
    assert out.endswith("DOES NOT HOLD\n")


@pytest.mark.parametrize(("head", "framework"), [("sequence_classification", "torch"), ("question_answering", "flax")])
def test_a_head_is_computed_in_its_class(tmp_path: Path, head: Head, framework: str):
    with open_checkpoint(PRE_LN) as checkpoint:
        rows = parameter_table(checkpoint.config, head=head)
        random = np.random.default_rng(0)
        arrays = {
            row.name: checkpoint.read(row.name)
            if row.name in checkpoint.names
            else random.standard_normal(row.shape).astype(np.float32)
            for row in rows
        }
        save_checkpoint(tmp_path / "a", checkpoint.config, rows, lambda row: arrays[row.name])
    result = verify(tmp_path / "a", frameworks=[framework])
    assert result.holds, result.problems
    (check,) = result.frameworks
    assert check.logits < TOLERANCE
    assert check.greedy == ()


def test_both_checkpoints_are_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def computed(framework: str, directory: Path, checkpoint: Any, inputs: Any) -> Any:
        return run_reference(checkpoint, inputs)

    monkeypatch.setattr(verify_module, "run_framework", computed)
    name = "model.decoder.layers.0.fc1.bias"
    result = verify(remake(tmp_path / "a", PRE_LN, nudged(name)), PRE_LN, frameworks=["reference", "torch"])
    assert [check.checkpoint for check in result.frameworks] == [str(tmp_path / "a"), str(PRE_LN)]
    assert all(check.holds for check in result.frameworks), "each computes what is in its own file"
    assert [problem.split()[0] for problem in result.problems] == [name]


def test_a_framework_that_cannot_load_it_is_a_problem(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(function_module, "FRAMEWORKS", {**FRAMEWORKS, "torch": ("tests.paths", "json")})
    result = verify(PRE_LN, frameworks=["torch"])
    assert len(result.problems) == 1
    assert "can't be computed in torch: ImportError: cannot import name 'main'" in result.problems[0]


def test_a_framework_that_is_not_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(function_module, "FRAMEWORKS", {"torch": ("opt_torch.cli", "no_such_module")})
    with pytest.raises(MissingFrameworkError, match="not installed"):
        verify(PRE_LN, frameworks=["torch"])
    with pytest.raises(CheckpointError, match="expected some of reference, torch"):
        verify(PRE_LN, frameworks=["caffe"])
    monkeypatch.setattr(verify_module, "is_installed", lambda _: False)
    assert verify(PRE_LN, frameworks=[ALL]).frameworks == ()


# The command


def test_the_other_checkpoint_is_named_once(capsys: pytest.CaptureFixture[str]):
    other = str(GOLDENS / "pre_ln/tf_h5")
    assert cli.main(["verify", str(PRE_LN), other]) == 0
    out = capsys.readouterr().out
    assert "52 the same bits" in out
    assert f"{PRE_LN} against {other}, both in the NumPy reference" in out
    assert out.endswith("holds\n")
    assert cli.main(["verify", str(PRE_LN), other, "--against", other]) == 1
    assert "named twice" in capsys.readouterr().err


def test_machines_are_told_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = remake(tmp_path / "a", PRE_LN, nudged("model.decoder.layers.2.fc2.weight"))
    assert cli.main(["verify", str(other), str(PRE_LN), "--json"]) == 3
    document = json.loads(capsys.readouterr().out)
    assert document["holds"] is False
    assert document["function"]["first_layer"] == "layer 2"
    assert len(document["function"]["hidden_states"]) == 4
    assert len(document["digests"]["model.decoder.layers.0.fc1.bias"]["sha256"]) == 64
    target = str(tmp_path / "b")
    command = ["convert", str(PRE_LN), target, "--to", "tf", "--verify", "--framework", "reference", "--json"]
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out)["verification"]["holds"]
