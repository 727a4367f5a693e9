"""`opt-torch generate` and its siblings: where prompts come from, and which settings a command line names."""

import dataclasses
import importlib
import io
import json
import os
import pty
import select
import subprocess
import sys
import time

import pytest

from opt_common.generation_config import GenerationConfig
from tests.paths import ROOT


@pytest.fixture
def generate(capsys):
    """Run the program with PyTorch's backend; what it does beyond loading the model is the same in all three."""
    main = importlib.import_module("opt_torch.cli").main

    def run(*arguments):
        code = main(["generate", "--max-new-tokens", "6", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_seed_decides_the_text(generate):
    arguments = ("One day", "--sample", "--seed", "7", "--top-p", "0.9", "--num-return-sequences", "3", "--json")
    code, out, _ = generate(*arguments)
    assert code == 0
    assert generate(*arguments)[1] == out
    texts = [json.loads(line)["text"] for line in out.splitlines()]
    assert len(set(texts)) == 3
    assert all(text.startswith("One day") for text in texts)


def test_prompts_from_a_file(generate, tmp_path, monkeypatch):
    expected = generate("One day", "Once upon", "--json")[1]
    lines, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("One day\n\nOnce upon\n", encoding="utf-8")
    objects.write_text('{"prompt": "One day"}\n"Once upon"\n', encoding="utf-8")
    assert generate("--input", str(lines), "--json")[1] == expected
    assert generate("--input", str(objects), "--json")[1] == expected
    monkeypatch.setattr("sys.stdin", io.StringIO('"One day"\n"Once upon"\n'))
    assert generate("--input", "-", "--json-lines", "--json")[1] == expected


def test_any_other_setting(generate):
    free = generate("One day")[1]
    assert generate("One day", "--set", "suppress_tokens=[]", "--set", "renormalize_logits=true")[1] == free
    assert (
        generate("One day", "--set", "repetition_penalty=9")[1] == generate("One day", "--repetition-penalty", "9")[1]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "2"], "temperature would change nothing"),
        (["--set", "num_beans=2"], "no setting num_beans"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0, expected a positive integer"),
        (["--input", "no-such-file"], "no-such-file cannot be read"),
        (["prompt", "--input", "file"], "both as arguments and by --input"),
    ],
)
def test_mistakes_get_a_sentence(generate, arguments, message):
    code, out, error = generate(*arguments)
    assert (code, out) == (1, "")
    assert message in error


def test_damaged_lines_are_named(generate, tmp_path):
    file = tmp_path / "prompts.jsonl"
    for text, message in (
        ('"a"\n{"text": 1}\n', 'line 2: expected a string or an object with a "prompt"'),
        ("\n", "holds no"),
    ):
        file.write_text(text, encoding="utf-8")
        assert message in generate("--input", str(file))[2]


def test_a_wrong_assignment_is_a_wrong_command_line(generate, capsys):
    with pytest.raises(SystemExit, match="2"):
        generate("--set", "top_k")
    assert "expected NAME=JSON" in capsys.readouterr().err


def test_every_setting_has_an_option(capsys):
    """What Python takes, the command line takes, with the words of its documentation."""
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module("opt_torch.cli").main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    unneeded = {"extra", "return_dict_in_generate", "output_scores", "output_logits"}
    names = {field.name for field in dataclasses.fields(GenerationConfig)} - unneeded
    assert not [name for name in names if f"--{name.replace('_', '-')}" not in text]
    assert "keep the fewest likeliest tokens" in text


def test_batches_say_what_prompts_say_alone(generate, tmp_path, monkeypatch):
    prompts = ["One day", "Once upon a time there", "A cat", "The dog was", "It"]
    alone = "".join(generate(prompt, "--json")[1] for prompt in prompts)
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts), encoding="utf-8")
    for size in ("1", "2", "5", "64"):
        code, out, err = generate("--input", str(file), "--json", "--batch-size", size)
        assert (code, out, err) == (0, alone, ""), "no bar where nobody looks"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert "5/5" in generate("--input", str(file), "--json", "--batch-size", "2")[2]
    assert not generate("--input", str(file), "--json", "--batch-size", "2", "--quiet")[2]


def test_a_negative_prompt(generate):
    """One for all prompts, whichever way they are continued."""
    options = ("--guidance-scale", "2.5", "--negative-prompt", "Once upon a time, there was a dog")
    free, texts = (generate("One day", "A cat", *more, "--json")[1].splitlines() for more in ((), options))
    assert free != texts
    for prompt, line in zip(("One day", "A cat"), texts, strict=True):
        assert generate(prompt, *options, "--json")[1].splitlines() == [line]
        assert generate(prompt, *options, "--stream")[1] == json.loads(line)["text"] + "\n"
    assert "negative_prompt_ids would change nothing" in generate("One day", *options[2:])[2]


def test_guesses_change_no_text(generate, tmp_path, monkeypatch):
    """By another model, read like the first; prompts then go one by one, unless one says otherwise."""
    prompts = ["One day", "Once upon a time there was a cat and a cat"]
    free = generate(*prompts, "--json")[1]
    for options in (
        ["--prompt-lookup-num-tokens", "3"],
        ["--assistant-model", "opt-tiny", "--num-assistant-tokens", "2"],
    ):
        assert generate(*prompts, "--json", *options)[:2] == (0, free)
        assert "continues one prompt at a time, got 2" in generate(*prompts, "--batch-size", "2", *options)[2]
    code, out, error = generate("One day", "--assistant-model", str(tmp_path / "nowhere"))
    assert (code, out) == (1, "")
    assert "nowhere" in error
    monkeypatch.setattr("sys.stdin", io.StringIO("and\n"))
    spoken = generate("--interactive", "One day", "--assistant-model", "opt-tiny")[1]
    monkeypatch.setattr("sys.stdin", io.StringIO("and\n"))
    assert spoken == generate("--interactive", "One day")[1]


def test_a_stop_string_is_cut_off(generate):
    whole = json.loads(generate("One day", "--json")[1])
    assert whole["text"] == "One day" + whole["continuation"]
    stop = whole["continuation"][4:7]
    found = json.loads(generate("One day", "--json", "--stop-strings", stop, "--stop-strings", "zzz")[1])
    assert found["continuation"] == whole["continuation"].partition(stop)[0]


def test_streams_on_request(generate):
    whole = generate("One day", "A cat")[1]
    assert generate("One day", "A cat", "--stream")[1] == whole


def test_an_interruption_prints_what_is_there(generate, monkeypatch):
    """130, one sentence, and the texts as far as they are."""
    whole = [json.loads(line) for line in generate("One day", "A cat", "--json")[1].splitlines()]
    model_class = importlib.import_module("opt_torch").OPTForCausalLM
    generate_ids = model_class.generate

    def interrupted(self, ids, attention_mask, *, streamer, **options):
        put, left = streamer.put, [4]

        def count(value):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            put(value)

        streamer.put = count
        return generate_ids(self, ids, attention_mask, streamer=streamer, **options)

    monkeypatch.setattr(model_class, "generate", interrupted)
    code, out, err = generate("One day", "A cat", "--json")
    assert (code, err) == (130, "opt-torch: interrupted.\n")
    for line, complete in zip(map(json.loads, out.splitlines()), whole, strict=True):
        assert line["complete"] is False
        assert complete["text"].startswith(line["text"])
        assert len(line["continuation"]) > 0
    code, out, _ = generate("One day", "--stream")
    assert code == 130
    assert whole[0]["text"].startswith(out.rstrip("\n"))
    assert len(out) > len("One day\n")


def test_a_conversation_reads_only_what_is_new(generate, monkeypatch):
    """The answers are those to the whole text each time, and each turn's cache is the next one's past."""
    model_class = importlib.import_module("opt_torch").OPTForCausalLM
    generate_ids, read = model_class.generate, []

    def watched(self, ids, *args, past_key_values=None, **options):
        read.append(ids.shape[1] - (0 if past_key_values is None else past_key_values.length))
        return generate_ids(self, ids, *args, past_key_values=past_key_values, **options)

    monkeypatch.setattr(model_class, "generate", watched)
    monkeypatch.setattr("sys.stdin", io.StringIO("Then the cat\n\n/reset\nOne day\n"))
    code, out, _ = generate("--interactive", "Once upon a time")
    assert code == 0
    first, second, third, fourth = out.splitlines()
    assert read[1] < 8, "the line's tokens, and the last one of the answer"
    assert read[2] == 1
    assert fourth == generate("One day")[1].rstrip("\n").removeprefix("One day")
    text = f"Once upon a time{first}\nThen the cat"
    assert generate(text)[1] == f"{text}{second}\n"
    assert generate(f"{text}{second}")[1] == f"{text}{second}{third}\n"


def test_in_a_terminal():
    """A real one: text streams, a person adds to it, Ctrl-C ends an answer, and at the prompt the program."""
    program = """
import fcntl, signal, sys, termios, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs behind its back with it ignored
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # from now on, Ctrl-C on this terminal is a signal to this program
from opt_common import streaming
from opt_torch.cli import main

push = streaming.TextDecoder.push
streaming.TextDecoder.push = lambda *arguments: time.sleep(0.2) or push(*arguments)  # time enough to interrupt it
sys.exit(main())
"""
    options = ["--interactive", "--max-new-tokens", "240", "--eos-token-id", "[]"]
    mine, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", program, "generate", *options],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        start_new_session=True,
    ) as process:
        os.close(theirs)
        try:
            rest = wait_for(b"> ", mine)
            os.write(mine, b"Once upon a time\n")
            rest = wait_for(b"there was", mine, rest)
            os.write(mine, b"\x03")
            rest = wait_for(b"> ", mine, rest)  # not the end of the program
            # Python misses a signal between readline's prompt and its wait for a key: whoever types presses again.
            wait_for(b"opt-torch: interrupted.", mine, rest, press=b"\x03")
            assert process.wait(timeout=100) == 130
        finally:
            process.kill()
            os.close(mine)


def wait_for(text, terminal, shown=b"", press=b""):
    """Read a terminal until it shows a text, pressing a key each second, and return what it showed behind that."""
    end = time.monotonic() + 100
    pressed = 0.0
    while text not in shown:
        assert time.monotonic() < end, shown.decode()
        if press and time.monotonic() > pressed + 1:
            os.write(terminal, press)
            pressed = time.monotonic()
        if select.select([terminal], [], [], 0.2)[0]:
            shown += os.read(terminal, 4096)
    return shown.partition(text)[2]
