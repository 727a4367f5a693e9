"""The examples run, learn, and go on after an interruption as if there had been none."""

import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.common import checkpoints
from examples.common.options import Options, parse
from examples.common.plot import main as plot_main
from examples.common.run import batch, learning_rates, main
from opt_common import OPTTokenizer
from tests.adapters import BACKENDS
from tests.paths import ROOT

REDUCED = {
    "language_model": "--layers 1 --hidden-size 64 --dropout 0.02 --length 64 --steps 120 "
    "--rows 300 --learning-rate 4e-3 --warmup 10",
    "fine_tuning": "--length 48 --rows 200 --steps 45",
    "text_classification": "--length 40 --rows 600 --steps 80 --batch-size 16",
    "question_answering": "--length 64 --rows 600 --steps 80 --learning-rate 2e-3",
    "lora": "--length 48 --rows 200 --steps 60",
}
BARS = {
    "language_model": 4.6,
    "fine_tuning": 2.5,
    "text_classification": 0.55,
    "question_answering": 0.15,
    "lora": 2.6,
}
"""What a run of that size must reach. A constant predictor has, in this order: 5.6, 4.1, 0.33, 0.04 and 4.1."""

SAME_FUNCTION = 2e-3
"""Largest difference between losses of two frameworks, relative: rounding in float32, which training makes larger."""

Run = Callable[[str, str], dict[str, Any]]


def task_of(name: str) -> Any:
    return importlib.import_module(f"examples.{name}.__main__").TASK


def arguments(name: str, framework: str, output: Path, *more: str) -> list[str]:
    return [framework, "--output", str(output), *REDUCED[name].split(), "--save-every", "10", *more]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The result of a task in a framework, from start to end, and where it is."""

    @functools.cache
    def find(name: str, framework: str) -> dict[str, Any]:
        output = tmp_path_factory.mktemp(f"{name}-{framework}")
        return {**main(task_of(name), arguments(name, framework, output)), "output": output}

    return find


@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize("name", REDUCED)
def test_it_learns_what_a_constant_predictor_does_not(name: str, framework: str, unbroken: Run):
    result = unbroken(name, framework)
    better = np.less if "loss" in result["metric"] else np.greater
    assert better(result["score"], BARS[name])
    assert better(BARS[name], result["constant_score"]), "the bar says nothing"
    assert np.mean(result["losses"][-10:]) < 0.85 * result["constant_loss"]

    output = result["output"]
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert json.loads((output / "result.json").read_text())["losses"] == result["losses"]
    steps = len(result["losses"])
    assert [path.name for path in output.glob("*checkpoint*")] == [f"checkpoint-{steps}"]
    assert OPTTokenizer.from_pretrained(output / f"checkpoint-{steps}").eos_token_id == 2


def test_the_frameworks_learn_alike(unbroken: Run):
    """Fine-tuning has no dropout and no new weights, so that the curves are one."""
    losses = [unbroken("fine_tuning", framework)["losses"] for framework in BACKENDS]
    for others in losses[1:]:
        np.testing.assert_allclose(others, losses[0], rtol=SAME_FUNCTION)


# Interrupted


@pytest.mark.parametrize("framework", BACKENDS)
def test_after_kill_9_it_goes_on_with_the_same_losses(
    framework: str, unbroken: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """With dropout. The process sees a terminal, and shows its progress there."""
    name, output = "language_model", tmp_path / "run"
    killed_at, shown = killed(arguments(name, framework, output), name, output)
    assert 20 <= killed_at < 120
    assert "step/s" in shown
    assert "loss=" in shown

    # What a kill in the middle of writing leaves.
    rest = output / ".unfinished"
    rest.mkdir(exist_ok=True)
    (rest / "model.safetensors").write_bytes(b"half")
    whole = unbroken(name, framework)
    capsys.readouterr()
    resumed = main(task_of(name), arguments(name, framework, output))
    assert f"going on after step {killed_at}," in capsys.readouterr().out
    assert resumed["losses"] == whole["losses"]
    assert resumed["score"] == whole["score"]
    assert not rest.exists()


def killed(command: list[str], name: str, output: Path) -> tuple[int, str]:
    """Run an example on a terminal, kill it after two checkpoints; the steps of its last, and what it showed."""
    terminal, end = os.openpty()
    termios.tcsetwinsize(end, (24, 100))
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", f"examples.{name}", *command], cwd=ROOT, stdout=end, stderr=end
    )
    os.close(end)
    shown = b""
    try:
        os.set_blocking(terminal, False)
        while process.poll() is None and saved(output) < 20:
            shown += drained(terminal)
            time.sleep(0.002)
        shown += drained(terminal)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert process.returncode == -signal.SIGKILL, shown.decode()
    return saved(output), shown.decode()


def saved(output: Path) -> int:
    return max((int(path.name.removeprefix("checkpoint-")) for path in output.glob("checkpoint-*")), default=0)


def drained(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except (BlockingIOError, OSError):
        return b""


def interrupted(monkeypatch: pytest.MonkeyPatch, name: str, framework: str, output: Path, at: int) -> None:
    """Run an example until Ctrl-C comes before a step."""
    trainer = importlib.import_module(f"examples.common.with_{framework}").Trainer
    step = trainer.step

    def stopped(self: Any, number: int, rows: Any) -> float:
        if number == at:
            raise KeyboardInterrupt
        return step(self, number, rows)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "step", stopped)
        with pytest.raises(KeyboardInterrupt):
            main(task_of(name), arguments(name, framework, output))


def test_a_run_goes_from_framework_to_framework(unbroken: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Model and AdamW's state: a third of the steps in each are those of either alone."""
    name, output = "fine_tuning", tmp_path
    for number, framework in enumerate(BACKENDS[:-1], start=1):
        interrupted(monkeypatch, name, framework, output, at=15 * number)
    losses = main(task_of(name), arguments(name, BACKENDS[-1], output))["losses"]
    for framework in BACKENDS:
        np.testing.assert_allclose(losses, unbroken(name, framework)["losses"], rtol=SAME_FUNCTION)


@pytest.mark.parametrize("framework", BACKENDS)
def test_an_adapter_goes_on_too(framework: str, unbroken: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With dropout; between two checkpoints, so that steps are done again."""
    interrupted(monkeypatch, "lora", framework, tmp_path, at=45)
    assert saved(tmp_path) == 40
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors"} <= {
        path.name for path in (tmp_path / "checkpoint-40").iterdir()
    }
    losses = main(task_of("lora"), arguments("lora", framework, tmp_path))["losses"]
    assert losses == unbroken("lora", framework)["losses"]


def test_a_run_with_other_options_is_not_gone_on_with(unbroken: Run):
    output = unbroken("fine_tuning", BACKENDS[0])["output"]
    with pytest.raises(SystemExit, match=r"other options: learning_rate was 0\.001 and is 0\.5\. Name another"):
        main(task_of("fine_tuning"), arguments("fine_tuning", BACKENDS[0], output, "--learning-rate", "0.5"))


def test_checkpoints_are_whole_or_not_there(tmp_path: Path):
    def fail(directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError("no room")

    first = checkpoints.save(tmp_path, (1.0,), {"seed": 0}, lambda directory: None)
    with pytest.raises(OSError, match="no room"):
        checkpoints.save(tmp_path, (1.0, 2.0), {"seed": 0}, fail)
    assert checkpoints.latest(tmp_path, {"seed": 0}) == first
    # Two of them: the process ended before the older one was removed.
    (tmp_path / "checkpoint-1").rename(tmp_path / "kept")
    last = checkpoints.save(tmp_path, tuple(map(float, range(10))), {"seed": 0}, lambda directory: None)
    (tmp_path / "kept").rename(tmp_path / "checkpoint-9")
    assert checkpoints.latest(tmp_path, {"seed": 0}) == last


# Data


def test_every_row_comes_once_a_turn():
    options = Options(framework="torch", output=Path(), batch_size=4)
    rows = {"input_ids": np.arange(13)}
    turns = [
        np.concatenate([batch(rows, 3 * turn + step, options)["input_ids"] for step in range(3)]) for turn in (0, 1)
    ]
    assert all(len(set(turn)) == 12 for turn in turns)
    assert turns[0].tolist() != turns[1].tolist()


def test_the_learning_rate_rises_and_falls():
    rates = learning_rates(Options(framework="torch", output=Path(), steps=10, warmup=4, learning_rate=1.0))
    np.testing.assert_allclose(rates, [0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_texts_are_packed_to_the_last_token(tmp_path: Path):
    from examples.common.texts import documents, pack

    tokenizer = OPTTokenizer.from_pretrained("opt-tiny")
    path = tmp_path / "wiki.test.raw"
    path.write_text(" = Title = \n \n The first text ,\n with two lines . \n\n\nThe second .\n", encoding="utf-8")
    texts = documents(path)
    assert texts == ["= Title =", "The first text ,\n with two lines .", "The second ."]
    blocks = pack(texts, tokenizer, 8)
    stream = [token for text in texts for token in tokenizer(text)["input_ids"]]
    assert blocks.ravel().tolist() == stream[: len(stream) // 8 * 8]


def test_labels_are_the_folders_and_imdb_s_texts_without_one_are_left_out(tmp_path: Path):
    for label, text in (("pos", "a good film"), ("neg", "a bad film"), ("unsup", "a film")):
        (tmp_path / label).mkdir()
        (tmp_path / label / "0_9.txt").write_text(text, encoding="utf-8")
    task = task_of("text_classification")
    tokenizer = OPTTokenizer.from_pretrained("opt-tiny")
    options = Options(framework="torch", output=Path(), length=16)
    rows = task.read(tmp_path, tokenizer, options)
    assert rows["labels"].tolist() == [0, 1]
    assert tokenizer.batch_decode(rows["input_ids"], skip_special_tokens=True) == ["a bad film", "a good film"]
    assert task.start(options, tokenizer, tmp_path).arguments["id2label"] == {0: "neg", 1: "pos"}


def test_answers_are_found_in_the_tokens(tmp_path: Path):
    """As SQuAD has them: several answers, none, in the middle of a word, behind what is cut off; also not in ASCII."""
    context = "In Zürich–Oerlikon, Tom saw the lighthouse. " + "It was far away. " * 20 + "The end."
    words = ("Zürich", "light", "Tom", "end")
    asked = [
        {"question": f"Which {word}?", "answers": [{"text": word, "answer_start": context.index(word)}] * 2}
        for word in words
    ]
    asked.append({"question": "Impossible?", "answers": []})
    path = tmp_path / "dev-v1.1.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": context, "qas": asked}]}]}), encoding="utf-8")
    task = task_of("question_answering")
    tokenizer = OPTTokenizer.from_pretrained("opt-tiny")
    rows = task.read(path, tokenizer, Options(framework="torch", output=Path(), length=64))
    assert len(rows["input_ids"]) == len(words)
    ends = [rows[name].tolist() for name in ("start_positions", "end_positions")]
    found = [tokenizer.decode(ids[start : end + 1]) for ids, start, end in zip(rows["input_ids"], *ends, strict=True)]
    for word, text in zip(words[:3], found, strict=False):
        assert word in text
        assert len(text) <= len(word) + len("house ")
    assert ends[0][3] >= 64


def test_all_answers_of_the_example_can_be_told():
    """Each question has its sentence once, so that a reader who understands the text gives the span asked for."""
    from examples.question_answering.data import FACTS, questions

    for paragraph in questions(200, seed=5)["data"][0]["paragraphs"]:
        (asked,) = paragraph["qas"]
        begin, text = asked["answers"][0]["answer_start"], asked["answers"][0]["text"]
        assert paragraph["context"][begin:].startswith(text + ".")
        name = next(
            word.strip("?") for word in asked["question"].split() if word[0].isupper() and word not in "Where What"
        )
        sentence = next(
            sentence.format(name=name, answer=text)
            for question, sentence, _ in FACTS
            if question.format(name=name) == asked["question"]
        )
        assert paragraph["context"].count(sentence) == 1


def test_bad_input_is_refused_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    task = task_of("fine_tuning")
    for more, message in (
        (["--train", "x"], "--train and --held-out belong together"),
        (["--steps", "0"], "--steps is 0; it must be 1 or more"),
    ):
        with pytest.raises(SystemExit):
            parse(task.kind, task.name, task.about, task.defaults, ["torch", *more])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"gives \d+ rows of 48 tokens, and a batch takes 500"):
        main(task, arguments("fine_tuning", BACKENDS[0], tmp_path, "--rows", "20", "--batch-size", "500"))
    with pytest.raises(SystemExit, match="no-such-model"):
        main(task, arguments("fine_tuning", BACKENDS[0], tmp_path, "--model", "./no-such-model"))


def test_one_plot_of_several_runs(unbroken: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = [str(unbroken("fine_tuning", framework)["output"]) for framework in BACKENDS]
    monkeypatch.setattr(sys, "argv", ["plot", str(tmp_path / "all.png"), *runs])
    plot_main()
    assert (tmp_path / "all.png").stat().st_size > 5000
