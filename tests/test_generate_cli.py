"""`opt-torch generate` and its siblings: where prompts come from, and which settings a command line names."""

import importlib
import io
import json

import pytest


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
        (["--set", "num_beams=2"], "no setting num_beams"),
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
