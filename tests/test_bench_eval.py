"""`bench` and `eval` of `opt-torch` and its siblings: figures that are what they say, and nothing written by halves."""

import importlib
import json
import math

import numpy as np
import pytest

from conversion import open_checkpoint
from conversion.synthetic import write_outliers, write_random
from examples.opt_tiny.corpus import stories
from opt_common import OPTConfig, reference
from opt_common.cli_eval import HELD_OUT
from opt_common.errors import ConfigError, InputError
from opt_common.evaluation import batches, layer_errors, outlier_channels, perplexity, windows
from opt_common.workloads import BITS, Bandwidth, Workload, timing

PROGRAMS = {"torch": "opt_torch.cli", "tf": "opt_tf.cli", "flax": "opt_flax.cli"}
TINY = OPTConfig(
    vocab_size=97, hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4, max_position_embeddings=160
)


@pytest.fixture
def command(backend, capsys):
    """Run a command of the backend's program: exit code, standard output, standard error."""
    main = importlib.import_module(PROGRAMS[backend.name]).main

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny") / "model"
    write_random(directory, TINY)
    return directory


# bench


def test_bench_writes_what_it_measures(command, tiny, tmp_path):
    names = ["decode:2", "prefill:1x24", "train:2x8"]
    code, out, _ = command(
        "bench", "--model", tiny, "--workloads", *names, "--rounds", 2, "--json", tmp_path / "figures.json"
    )
    assert code == 0
    found = json.loads((tmp_path / "figures.json").read_text())
    assert [one["workload"] for one in found["timings"]] == names
    for one in found["timings"]:
        assert len(one["seconds"]) == 2
        assert one["tokens_per_s"] == pytest.approx(Workload.parse(one["workload"]).tokens / np.median(one["seconds"]))
        assert f"| {one['workload']} | {one['tokens_per_s']:.1f} |" in out
    assert found["timings"][0]["of_limit"] > 0
    assert found["timings"][1]["of_limit"] is None


def test_training_in_mixed_precision_is_timed(command, tiny):
    code, out, _ = command("bench", "--model", tiny, "--workloads", "train:2x8", "--rounds", 1, "--dtype", "bfloat16")
    assert code == 0
    assert "| train:2x8 |" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads", "decode"], "The workload 'decode' is not known. Write decode:BATCH"),
        (["--workloads", "prefill:1x161"], "prefill:1x161 takes 161 positions, but the model has 160."),
        (["--workloads", "train:1x8", "--quantization", "int8-dynamic"], "Weights in few bits do not train."),
        (["--rounds", 0], "--rounds is 0, expected 1 or more."),
        (["--rounds", 1, "--workloads", "prefill:1x8", "--json", "/no/such/place"], "/no/such/place cannot be written"),
    ],
)
def test_bench_says_what_is_wrong(command, tiny, arguments, message):
    code, _, error = command("bench", "--model", tiny, *arguments)
    assert code == 1
    assert message in error
    assert "Traceback" not in error


def test_workloads_cost_what_the_definition_says():
    layers, head = 2 * (4 * 32 * 32 + 2 * 32 * 64), 97 * 32
    decode = Workload.parse("decode:8")
    assert (decode.batch, decode.length, decode.new_tokens, decode.positions, decode.tokens) == (8, 32, 128, 159, 1024)
    assert decode.best_seconds(TINY, BITS["int8"], 1e3, None) == 128 * (layers + head) / 1e3
    untied = TINY.replace(tie_word_embeddings=False)
    assert decode.best_seconds(untied, 4, 1, None) == decode.best_seconds(TINY, 4, 1, None)
    prefill, train = Workload.parse("prefill:2x16"), Workload.parse("train:2x16")
    assert prefill.best_seconds(TINY, 32, 1, None) is None
    assert prefill.best_seconds(TINY, 32, 1, 64) == 2 * (32 * layers + 2 * head) / 64
    assert train.best_seconds(TINY, 32, 1, 64) == 6 * 32 * (layers + head) / 64
    one = timing("train:2x16", [4.0, 1.0, 2.0], 1.0)
    assert (one.tokens_per_s, one.of_limit, one.spread) == (16, 0.5, 1.5)
    assert (prefill.prompts(50, 1) != prefill.prompts(50, 2)).any()
    for wrong in ("decode:0", "decode:1x2", "prefill:3", "train:axb", ""):
        with pytest.raises(InputError, match="is not known"):
            Workload.parse(wrong)


def test_bandwidth_is_a_machine_s():
    assert 1e8 < Bandwidth(1 << 24).measure() < 1e13


# eval


def test_eval_is_the_reference_s_perplexity(backend, command, tmp_path):
    """Windows of seven tokens, the last batch short: against NumPy in float64, window by window.

    lm-evaluation-harness#806, #1471, #1586, #2301: a perplexity compares with nothing unless it says what it counts.
    """
    text = "One day, a little fox went to the river. The river was cold."
    (tmp_path / "text.txt").write_text(text)
    code, out, _ = command(
        "eval",
        *("--input", tmp_path / "text.txt", "--window", 7, "--batch-size", 2),
        *("--json", tmp_path / "figures.json"),
    )
    assert code == 0
    found = json.loads((tmp_path / "figures.json").read_text())
    from opt_common import OPTTokenizer
    from opt_common.hub import resolve

    ids = OPTTokenizer.from_pretrained("opt-tiny")(text)["input_ids"]
    losses, count = 0.0, 0
    with open_checkpoint(resolve("opt-tiny")) as checkpoint:
        weights = {name: checkpoint.read(name).astype(np.float64) for name in checkpoint.names}
        for start in range(0, len(ids), 7):
            window = np.asarray([ids[start : start + 7]])
            if window.size > 1:
                output = reference.forward(checkpoint.config, weights, window, labels=window)
                losses += float(output.loss) * (window.size - 1)
                count += window.size - 1
    assert found["tokens"] == count
    plain, rounded = found["figures"]
    assert plain["perplexity"] == pytest.approx(math.exp(losses / count), rel=1e-5)
    assert rounded["weights"] == "int8-dynamic"
    assert rounded["change"] == pytest.approx(rounded["perplexity"] / plain["perplexity"] - 1)
    assert len(rounded["layer_errors"]) == checkpoint.config.num_hidden_layers + 1
    assert all(0 < error < 0.1 for error in rounded["layer_errors"])
    assert f"| float32 | {plain['perplexity']:.4f} |" in out
    assert f"Perplexity per token: {count} tokens, in" in out
    assert "windows of at most 7 with nothing read across" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--outliers", 0], "--outliers is 0.0, expected a number above 0"),
        (["--window", 1], "--window is 1, which is too small."),
        (["--input", "/no/such/file"], "/no/such/file cannot be read"),
    ],
)
def test_eval_says_what_is_wrong(command, arguments, message):
    code, _, error = command("eval", *arguments)
    assert code == 1
    assert message in error


def test_eval_reads_lines_of_json(command, tmp_path):
    (tmp_path / "texts.jsonl").write_text('"Once upon a time"\n{"text": "One day"}\n')
    code, out, _ = command("eval", "--input", tmp_path / "texts.jsonl", "--quantization", "none")
    assert code == 0
    assert "Perplexity per token: " in out
    (tmp_path / "texts.jsonl").write_text('{"prompt": "One day"}\n')
    code, _, error = command("eval", "--input", tmp_path / "texts.jsonl")
    assert code == 1
    assert 'texts.jsonl, line 1: expected a string or an object with a "text"' in error


def test_the_held_out_stories_are_of_a_seed_of_their_own():
    held_out = [json.loads(line)["text"] for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    assert held_out == list(stories(60, seed=999))


@pytest.mark.parametrize("factor", [64.0, 1 / 64])
def test_outliers_change_no_logits(tiny, tmp_path, factor):
    """Powers of two: not a bit of the products changes, and one channel in a hundred is large."""
    write_outliers(str(tiny), tmp_path / "outliers", factor)
    ids = np.arange(4, 24).reshape(2, 10)
    found = []
    for path in (tiny, tmp_path / "outliers"):
        with open_checkpoint(path) as checkpoint:
            weights = {name: np.asarray(checkpoint.read(name), np.float64) for name in checkpoint.names}
            found.append((weights, reference.forward(checkpoint.config, weights, ids).logits))
    (plain, expected), (scaled, logits) = found
    np.testing.assert_allclose(logits, expected, rtol=1e-12)
    channels = outlier_channels(TINY.hidden_size)
    norm, matrix = "model.decoder.layers.1.final_layer_norm.weight", "model.decoder.layers.1.fc1.weight"
    np.testing.assert_array_equal(scaled[norm][channels], factor * plain[norm][channels])
    np.testing.assert_array_equal(scaled[matrix][:, channels], plain[matrix][:, channels] / factor)
    assert (scaled[norm] != plain[norm]).sum() == len(channels) == 1


def test_random_matrices_are_all_different(tiny):
    with open_checkpoint(tiny) as checkpoint:
        matrices = [checkpoint.read(name) for name in checkpoint.names if checkpoint.info(name).shape == (32, 32)]
    assert len(matrices) == 8
    assert len({matrix.tobytes() for matrix in matrices}) == len(matrices)


def test_outliers_need_norms_in_front(tmp_path):
    write_random(tmp_path / "post", TINY.replace(do_layer_norm_before=False))
    with pytest.raises(ConfigError, match="Outliers need layer norms with weights in front of the matrices"):
        write_outliers(str(tmp_path / "post"), tmp_path / "outliers", 64.0)
    assert not (tmp_path / "outliers").exists()


def test_rules_of_evaluation():
    assert windows([[2, 5, 6, 7, 8], [2]], 2) == [[2, 5], [6, 7]]
    first, second = batches([[2, 5, 6], [2, 7], [2, 9]], 2, pad_token_id=1)
    assert first.input_ids.tolist() == [[2, 5, 6], [2, 7, 1]]
    assert first.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert first.labels.tolist() == [[2, 5, 6], [2, 7, -100]]
    assert (first.scored, second.scored) == (3, 1)
    assert perplexity([1.0, 3.0], [3, 1]) == pytest.approx(math.exp(1.5))
    moved = layer_errors([np.full((1, 2, 2), 3.0)], [np.full((1, 2, 2), 2.0)], np.array([[1, 0]]))
    assert moved == [0.5]
