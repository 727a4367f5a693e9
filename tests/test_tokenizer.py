"""`OPTTokenizer`: Hugging Face's ids and texts with OPT's own vocabulary; every option with a small one made here."""

import gzip
import hashlib
import importlib
import inspect
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from opt_common.encoding import BatchEncoding
from opt_common.errors import CheckpointError, MissingFrameworkError, TokenizerError
from opt_common.tokenizer import OPTTokenizer
from opt_common.tokenizer_files import VERY_LONG
from tests.adapters import BACKENDS
from tests.paths import GOLDENS, VOCAB_DIR

NO_VOCABULARY = "needs OPT's own vocab.json and merges.txt: name their directory in OPT_VOCAB_DIR"
BESIDE_REPOSITORY = Path(__file__).parents[2] / "shared" / "opt_tokenizer"

BOS, PAD = 2, 1
TENSORS = {"torch": ("pt", "torch"), "tf": ("tf", "tensorflow"), "flax": ("jax", "jax.numpy")}
LINES = [
    "The cat sat on the mat, and the dog sat beside the cat.",
    "The dog said: that's a good mat, isn't it? They're all good mats.",
    "One day the cat and the dog went to the sea. It was a good day.",
]


def golden(name: str) -> Any:
    return json.loads((GOLDENS / "tokenizer" / name).read_text(encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


# With OPT's own vocabulary: every golden


@pytest.fixture(scope="module")
def vocabulary_directory() -> Path:
    directory = VOCAB_DIR or BESIDE_REPOSITORY
    if VOCAB_DIR is None and not directory.is_dir():
        pytest.skip(NO_VOCABULARY)
    return directory


@pytest.fixture(scope="module")
def opt(vocabulary_directory) -> OPTTokenizer:
    return OPTTokenizer.from_pretrained(vocabulary_directory)


def test_the_vocabulary_is_that_of_the_goldens(vocabulary_directory, opt):
    info = golden("info.json")
    for name, key in (("vocab.json", "vocab_json_sha256"), ("merges.txt", "merges_txt_sha256")):
        assert hashlib.sha256((vocabulary_directory / name).read_bytes()).hexdigest() == info[key]
    assert (opt.vocab_size, len(opt)) == (info["vocab_size"], info["len_slow"])
    assert [opt.bos_token_id, opt.eos_token_id, opt.unk_token_id] == [info["bos"], info["eos"], info["unk"]]
    assert opt.pad_token_id == info["pad"]
    assert opt.all_special_ids == info["all_special_ids"]
    assert list(opt.model_input_names) == info["model_input_names"]
    assert (opt.padding_side, opt.truncation_side) == (info["padding_side"], info["truncation_side"])
    assert str(opt.model_max_length) == info["model_max_length"]


@pytest.mark.filterwarnings("ignore:A text begins with")
def test_golden_strings(opt):
    with gzip.open(GOLDENS / "tokenizer" / "tokenizer_goldens.jsonl.gz", "rt", encoding="utf-8") as lines:
        cases = [json.loads(line) for line in lines]
    assert len(cases) == golden("info.json")["n_strings"]
    wrong = []
    for case in cases:
        ids = opt(case["text"]).input_ids
        got = {
            "ids_slow": ids,
            "ids_fast": ids,
            "ids_slow_no_special": opt(case["text"], add_special_tokens=False).input_ids,
            "tokens_slow": opt.convert_ids_to_tokens(ids),
            "decode": opt.decode(ids),
            "decode_fast": opt.decode(ids),
            "decode_skip": opt.decode(ids, skip_special_tokens=True),
            "decode_fast_skip": opt.decode(ids, skip_special_tokens=True),
            "decode_skip_cleanup": opt.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True),
        }
        wrong += [(case["text"], key, value, case[key]) for key, value in got.items() if value != case[key]]
    assert not wrong, wrong[:3]
    assert opt([case["text"] for case in cases]).input_ids == [case["ids_slow"] for case in cases]


def test_golden_decodes(opt):
    goldens = golden("decode_goldens.json")
    for case in goldens["decode"]:
        assert opt.decode(case["ids"]) == case["decode"] == case["decode_fast"]
        assert opt.decode(case["ids"], skip_special_tokens=True) == case["decode_skip"] == case["decode_fast_skip"]
        assert opt.convert_ids_to_tokens(case["ids"]) == case["tokens"]
    for case in goldens["out_of_vocabulary"]:
        assert opt.decode(case["ids"]) == case["fast"]


def test_golden_pairs_follow_the_slow_tokenizer(opt):
    goldens = golden("batch_goldens.json")
    for case in goldens["pairs"]:
        assert opt(case["a"], case["b"]) == case["slow"]
        assert opt(case["a"], case["b"], add_special_tokens=False) == case["slow_no_special"]
        assert opt([case["a"]], [case["b"]]) == {name: [row] for name, row in case["slow"].items()}
    for case in goldens["pair_truncation"]:
        got = opt(case["a"], case["b"], truncation=case["strategy"], max_length=case["max_length"])
        assert got == case["slow"]


@pytest.mark.parametrize("number", range(32))
def test_golden_batches(vocabulary_directory, opt, number):
    cases = golden("batch_goldens.json")["batches"]
    assert len(cases) == 32
    case = cases[number]
    tokenizer = OPTTokenizer(opt.engine, padding_side=case["padding_side"], truncation_side=case["truncation_side"])
    assert tokenizer(case["texts"], **case["kwargs"]) == case["slow"] == case["fast"]


def test_files_as_hugging_face_writes_them(vocabulary_directory, opt, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).symlink_to((vocabulary_directory / name).resolve())
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).write_bytes((GOLDENS / "tokenizer" / name).read_bytes())
    tokenizer = OPTTokenizer.from_pretrained(tmp_path)
    assert tokenizer.special_tokens_map == opt.special_tokens_map
    text = "Hello </s> world, a<pad>b"
    assert tokenizer(text) == opt(text)


def test_what_is_saved_reads_back_the_same(opt, tmp_path):
    opt.save_pretrained(tmp_path)
    texts = ["Hello </s> world", " \n\u00e9\u4e2d\U0001f600", "a<pad>b's"]
    assert OPTTokenizer.from_pretrained(tmp_path)(texts) == opt(texts)
    (tmp_path / "tokenizer.json").unlink()
    assert OPTTokenizer.from_pretrained(tmp_path)(texts) == opt(texts)


# With a small vocabulary


@pytest.fixture(scope="module")
def engine_state() -> str:
    """A byte-level BPE with OPT's first four tokens and a few dozen merges, as the text of a `tokenizer.json`."""
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(LINES, trainer)
    return engine.to_str()


@pytest.fixture
def directory(engine_state, tmp_path) -> Path:
    """`vocab.json` and `merges.txt`."""
    model = json.loads(engine_state)["model"]
    write_json(tmp_path / "vocab.json", model["vocab"])
    merges = [" ".join(merge) for merge in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return tmp_path


@pytest.fixture
def tokenizer(directory) -> OPTTokenizer:
    return OPTTokenizer.from_pretrained(directory)


def test_the_prefix_is_there_once_and_nothing_at_the_end(tokenizer):
    assert tokenizer("").input_ids == [BOS]
    ids = tokenizer("The cat").input_ids
    assert ids[0] == BOS
    assert BOS not in ids[1:]
    assert tokenizer("The cat", add_special_tokens=False).input_ids == ids[1:] == tokenizer.encode("The cat")[1:]
    assert tokenizer("The cat", return_special_tokens_mask=True).special_tokens_mask == [1] + [0] * (len(ids) - 1)


def test_a_second_prefix_is_put_in_aloud_or_not_at_all(tokenizer):  # TransformerLens#153, ColossalAI-Examples#160
    bare = tokenizer.encode("The cat", add_special_tokens=False)
    with pytest.warns(UserWarning, match="begins with '</s>', and another one is put in front of it") as caught:
        assert tokenizer("</s>The cat").input_ids == [BOS, BOS, *bare]
    assert caught[0].filename == __file__
    assert tokenizer("</s>The cat", add_special_tokens=False).input_ids == [BOS, *bare]
    assert tokenizer(" </s>").input_ids[0] == BOS
    tokenizer.add_bos_token = "once"
    assert tokenizer("</s>The cat").input_ids == tokenizer("The cat").input_ids == [BOS, *bare]
    assert tokenizer(tokenizer.decode([BOS, *bare])).input_ids == [BOS, *bare]
    assert tokenizer("</s></s>The cat").input_ids == [BOS, BOS, *bare]
    assert tokenizer("</s>The", "</s>cat").input_ids == tokenizer("The", "cat").input_ids
    tokenizer.add_bos_token = False
    assert tokenizer("The cat").input_ids == bare
    assert tokenizer("</s>The cat").input_ids == [BOS, *bare]
    tokenizer.add_bos_token = "twice"
    with pytest.raises(TokenizerError, match="add_bos_token is 'twice', expected True, False or 'once'"):
        tokenizer("The cat")


@pytest.mark.parametrize("value", [True, False, "once"])
def test_the_prefix_can_be_chosen_when_loading(directory, value):
    tokenizer = OPTTokenizer.from_pretrained(directory, add_bos_token=value)
    assert (tokenizer("cat").input_ids[0] == BOS) == bool(value)


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.characters(codec="utf-8"), max_size=40))
def test_no_text_is_lost(engine_state, text):
    tokenizer = OPTTokenizer(Tokenizer.from_str(engine_state))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_tokens_to_string(tokenizer.tokenize(text)) == text


def test_padding(tokenizer):
    texts = ["The cat sat", "", "The cat sat on the mat"]
    rows = tokenizer(texts).input_ids
    longest = max(map(len, rows))
    for options, width in (
        ({"padding": True}, longest),
        ({"padding": "longest"}, longest),
        ({"padding": "max_length", "max_length": 50}, 50),
        ({"padding": True, "pad_to_multiple_of": 16}, -(-longest // 16) * 16),
        ({"padding": "max_length", "max_length": 50, "pad_to_multiple_of": 16}, 64),
    ):
        right = tokenizer(texts, **options)
        left = tokenizer(texts, padding_side="left", **options)
        for number, row in enumerate(rows):
            fill = width - len(row)
            assert right.input_ids[number] == row + [PAD] * fill
            assert right.attention_mask[number] == [1] * len(row) + [0] * fill
            assert left.input_ids[number] == [PAD] * fill + row
            assert left.attention_mask[number] == [0] * fill + [1] * len(row)
    assert tokenizer(texts, padding=False).input_ids == tokenizer(texts, padding="do_not_pad").input_ids == rows


def test_the_padding_side_is_that_of_the_call_or_the_attribute_or_the_loading(directory, tokenizer):
    texts = ["", "cat"]
    left = tokenizer(texts, padding=True, padding_side="left")
    tokenizer.padding_side = "left"
    assert tokenizer(texts, padding=True) == left
    assert OPTTokenizer.from_pretrained(directory, padding_side="left")(texts, padding=True) == left
    assert tokenizer(texts, padding=True, padding_side="right") != left


def test_truncation(tokenizer):
    ids = tokenizer("The cat sat on the mat").input_ids
    assert tokenizer("The cat sat on the mat", truncation=True, max_length=4).input_ids == ids[:4]
    assert tokenizer("The cat sat on the mat", truncation=True, max_length=1).input_ids == [BOS]
    assert tokenizer("The cat sat on the mat", truncation=True, max_length=len(ids)).input_ids == ids
    assert tokenizer("", truncation=True, max_length=4).input_ids == [BOS]
    tokenizer.truncation_side = "left"
    assert tokenizer("The cat sat on the mat", truncation=True, max_length=4).input_ids == [BOS, *ids[-3:]]
    assert tokenizer("The cat sat on the mat", truncation=True, max_length=1).input_ids == [BOS]
    tokenizer.model_max_length = 3
    assert tokenizer("The cat sat on the mat", truncation=True).input_ids == [BOS, *ids[-2:]]
    assert tokenizer("", padding="max_length").input_ids == [BOS, PAD, PAD]


def test_max_length_without_its_options_is_said_aloud(tokenizer):
    with pytest.warns(UserWarning, match="max_length without truncation: texts are truncated"):
        assert len(tokenizer("The cat sat on the mat", max_length=4).input_ids) == 4
    with pytest.warns(UserWarning, match="max_length has no effect"):
        assert len(tokenizer("The cat sat on the mat", max_length=4, padding=True).input_ids) > 4


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"padding": "longer"}, "padding is 'longer', expected one of False, 'do_not_pad', True"),
        ({"padding": 1}, "padding is 1, expected"),
        ({"truncation": "left"}, "truncation is 'left', expected one of None, False"),
        ({"truncation": True}, "no model_max_length, so that you have to give a max_length"),
        ({"padding": "max_length"}, "no model_max_length, so that you have to give a max_length"),
        ({"truncation": True, "max_length": 0}, "max_length is 0, expected a positive integer"),
        ({"truncation": True, "max_length": 2.0}, "max_length is 2.0, expected a positive integer"),
        ({"padding": True, "pad_to_multiple_of": True}, "pad_to_multiple_of is True, expected a positive integer"),
        ({"truncation": "only_second", "max_length": 2}, "can't take 3 tokens from texts of \\[4\\]"),
        ({"text_pair": "dog", "truncation": True, "max_length": 1}, "max_length is 1, but 2 tokens are put in"),
        ({"text_pair": "dog", "truncation": "only_second", "max_length": 2}, "can't take . tokens from texts of"),
        ({"text_pair": ["dog"]}, "text_pair must be a text for a text"),
        ({"padding_side": "up"}, "padding_side is 'up', expected 'left' or 'right'"),
        ({"return_tensors": "mlx"}, "return_tensors is 'mlx', expected one of 'np', 'pt', 'tf', 'jax' or None"),
    ],
)
def test_one_sentence_says_what_is_wrong_with_a_call(tokenizer, options, text):
    with pytest.raises(TokenizerError, match=text) as error:
        tokenizer("qxyz", **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "text is a NoneType, expected a string or a list of strings"),
        (3, "text is a int, expected"),
        (b"cat", "text is a bytes, expected"),
        (["cat", None], "text\\[1\\] is a NoneType, expected a string"),
        ([["The", "cat"]], "text\\[0\\] is a list, expected a string"),
        ("cat\ud83d", "Text 0 of 1 holds half of a surrogate pair"),
        (["cat", "\ude00"], "Text 1 of 2 holds half of a surrogate pair"),
    ],
)
def test_what_is_no_text(tokenizer, value, text):
    with pytest.raises(TokenizerError, match=text):
        tokenizer(value)


def test_a_misspelt_option_is_an_error(tokenizer, directory):
    with pytest.raises(TypeError, match="max_lenght"):
        tokenizer("cat", max_lenght=3)
    with pytest.raises(TypeError, match="pading_side"):
        OPTTokenizer.from_pretrained(directory, pading_side="left")


def test_every_argument_of_loading_has_its_description():
    described = inspect.getdoc(OPTTokenizer.from_pretrained)
    for name in inspect.signature(OPTTokenizer.from_pretrained).parameters:
        assert f"{name}: " in described


# Tensors


def test_numpy_arrays(tokenizer):
    one = tokenizer("The cat", return_tensors="np")
    assert one.input_ids.dtype == one.attention_mask.dtype == np.int64
    assert one.input_ids.tolist() == [tokenizer("The cat").input_ids]
    assert tokenizer([], return_tensors="np").input_ids.shape == (0, 0)
    assert tokenizer([]) == {"input_ids": [], "attention_mask": []}
    with pytest.raises(TokenizerError, match=r"Rows of 1 to \d+ tokens are no tensor\. Pass padding=True"):
        tokenizer(["", "The cat"], return_tensors="np")
    assert tokenizer.encode("The cat", return_tensors="np").tolist() == one.input_ids.tolist()
    assert list(tokenizer("cat", return_tensors="np", return_attention_mask=False)) == ["input_ids"]


@pytest.mark.parametrize("name", BACKENDS)
def test_tensors_of_each_framework_and_back(tokenizer, name):
    kind, module = TENSORS[name]
    framework: Any = importlib.import_module(module)
    texts = ["The cat sat", "The dog"]
    expected = tokenizer(texts, padding=True)
    got = tokenizer(texts, padding=True, return_tensors=kind)
    is_tensor = {"torch": "Tensor", "tensorflow": "Tensor", "jax.numpy": "ndarray"}[module]
    for entry, column in expected.items():
        assert isinstance(got[entry], getattr(framework, is_tensor))
        assert np.asarray(got[entry]).tolist() == column
        assert str(got[entry].dtype).endswith("int64" if name == "torch" else "int32") or "int32" in str(
            got[entry].dtype
        )
    decoded = [f"</s>{texts[0]}", f"</s>{texts[1]}"]
    padless = [text.replace("<pad>", "") for text in tokenizer.batch_decode(got.input_ids)]
    assert padless == decoded
    assert tokenizer.batch_decode(got.input_ids, skip_special_tokens=True) == texts
    assert tokenizer.decode(got.input_ids[0], skip_special_tokens=True) == texts[0]
    assert tokenizer.decode(got.input_ids[0][0]) == "</s>"
    assert tokenizer.decode([got.input_ids[0][0], got.input_ids[0][1]]) == tokenizer.decode(expected.input_ids[0][:2])
    assert tokenizer.convert_ids_to_tokens(got.input_ids[0]) == tokenizer.convert_ids_to_tokens(expected.input_ids[0])


@pytest.mark.parametrize(
    ("kind", "modules"), [("pt", ["torch"]), ("tf", ["tensorflow"]), ("jax", ["jax", "jax.numpy"])]
)
def test_a_framework_that_is_not_installed(tokenizer, monkeypatch, kind, modules):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    extra = {"pt": "torch", "tf": "tf", "jax": "flax"}[kind]
    with pytest.raises(
        MissingFrameworkError, match=rf"return_tensors='{kind}' needs {modules[0]}.*opt-models\[{extra}\]"
    ):
        tokenizer("cat", return_tensors=kind)


@pytest.mark.skipif("torch" not in BACKENDS, reason="torch is not under test")
def test_to_moves_torch_tensors(tokenizer):
    encoding = tokenizer(["The cat"], return_tensors="pt")
    moved = encoding.to("meta")
    assert moved is encoding
    assert {value.device.type for value in moved.values()} == {"meta"}
    assert {**moved}.keys() == {"input_ids", "attention_mask"}


def test_to_is_for_torch_tensors_only(tokenizer):
    for options in ({}, {"return_tensors": "np"}):
        with pytest.raises(TokenizerError, match="not a torch tensor. Encode with return_tensors='pt'"):  # noqa: RUF043
            tokenizer("cat", **options).to("cpu")


def test_an_encoding_is_a_dict_with_attributes(tokenizer):
    encoding = tokenizer("cat")
    assert isinstance(encoding, BatchEncoding)
    assert dict(**encoding) == {name: encoding[name] for name in encoding} == encoding
    assert encoding.input_ids is encoding["input_ids"]
    assert len(encoding) == 2
    with pytest.raises(AttributeError, match="no 'labels', only input_ids, attention_mask"):
        _ = encoding.labels


def test_importing_loads_neither_the_library_nor_a_framework():
    program = (
        "import sys, opt_common.tokenizer; "
        "sys.exit(bool({'tokenizers', 'huggingface_hub', 'torch', 'tensorflow', 'jax'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], check=True)


# Decoding


def test_skipping_special_tokens(tokenizer):
    ids = [BOS, *tokenizer.encode("cat", add_special_tokens=False), PAD, 0, 3]
    assert tokenizer.decode(ids) == "</s>cat<pad><s><unk>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "cat<s><unk>"
    assert tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True)[-2:] == ["<s>", "<unk>"]
    assert tokenizer.batch_decode([[BOS], []], skip_special_tokens=True) == ["", ""]


def test_bytes_that_are_no_text(tokenizer):
    ids = tokenizer.encode("\U0001f600", add_special_tokens=False)
    assert len(ids) == 4
    for count in (1, 2, 3):
        assert tokenizer.decode(ids[:count]) == "\ufffd"
    assert tokenizer.decode([*ids[:2], BOS, *ids]) == "\ufffd</s>\U0001f600"


def test_ids_that_no_token_has_are_skipped(tokenizer):
    cat = tokenizer.encode("cat", add_special_tokens=False)
    assert tokenizer.decode([*cat, len(tokenizer), 2**32 - 1]) == "cat"
    assert tokenizer.decode(len(tokenizer)) == ""
    assert tokenizer.convert_ids_to_tokens(len(tokenizer)) is None


def test_cleaning_up_spaces(tokenizer):
    text = "It is n't a cat , is it ? I 'm sure . He 's so 've 're ' x !"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    clean = "It isn't a cat, is it? I'm sure. He's so've're'x!"
    assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True) == clean
    tokenizer.clean_up_tokenization_spaces = True
    assert tokenizer.batch_decode([ids], skip_special_tokens=True) == [clean]
    assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([[1, 2]], "Token ids are list, expected a row of integers. Use batch_decode"),
        (np.array([[1, 2]]), "Token ids are list, expected a row"),
        ([1.0], "Token ids are float, expected a row"),
        ("12", "expected a row of integers"),
        (None, "expected a row of integers"),
        ([1, None], "Token ids are NoneType, int, expected a row"),
        ([5, -100], "Got token id -100, expected ids from 0"),
        (2**32, "Got token id 4294967296"),
    ],
)
def test_what_is_no_row_of_ids(tokenizer, ids, text):
    with pytest.raises(TokenizerError, match=text):
        tokenizer.decode(ids)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.uint16])
def test_integers_of_every_width(tokenizer, dtype):
    assert tokenizer.decode(np.array([BOS, PAD], dtype)) == tokenizer.decode([dtype(BOS), dtype(PAD)]) == "</s><pad>"
    assert tokenizer.decode(dtype(BOS)) == "</s>"


# The vocabulary


def test_the_vocabulary(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == len(tokenizer.get_vocab()) == 320
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    assert tokenizer.convert_tokens_to_ids("</s>") == BOS
    assert tokenizer.convert_tokens_to_ids("no such token") == tokenizer.unk_token_id == BOS
    assert tokenizer.convert_ids_to_tokens(1) == "<pad>"
    assert tokenizer.tokenize("The cat") == tokenizer.convert_ids_to_tokens(tokenizer.encode("The cat")[1:])
    assert tokenizer.all_special_tokens == ["</s>", "<pad>"]
    assert "320 tokens" in repr(tokenizer)


def test_special_tokens_can_be_set(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer(["", "cat"], padding=True).input_ids[0][:2] == [BOS, BOS]
    tokenizer.bos_token = "<s>"
    assert tokenizer("").input_ids == [0]
    assert tokenizer.decode([0, BOS], skip_special_tokens=True) == ""
    tokenizer.pad_token = None
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (None, None)
    with pytest.raises(TokenizerError, match=r"padding needs a pad_token.*Set tokenizer\.pad_token"):
        tokenizer(["", "cat"], padding=True)
    with pytest.raises(TokenizerError, match=r"pad_token is '\[PAD\]', which is no token of this vocabulary"):
        tokenizer.pad_token = "[PAD]"
    tokenizer.bos_token = None
    with pytest.raises(TokenizerError, match="this tokenizer has no bos_token"):
        tokenizer("cat")
    assert tokenizer("cat", add_special_tokens=False).input_ids


# Files


def test_special_tokens_as_texts_and_as_objects(directory):
    token = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": True, "rstrip": False}
    write_json(directory / "special_tokens_map.json", {"bos_token": "<unk>", "eos_token": "<unk>"})
    write_json(directory / "tokenizer_config.json", {"bos_token": token, "pad_token": "<pad>"})
    tokenizer = OPTTokenizer.from_pretrained(directory)
    expected = {"bos_token": "<s>", "eos_token": "<unk>", "unk_token": "</s>", "pad_token": "<pad>"}
    assert tokenizer.special_tokens_map == expected
    assert tokenizer("a<s>b").input_ids[::2] == [0, 0]


def test_added_tokens(directory):
    write_json(directory / "added_tokens.json", {"<img>": 320, "plain": 321})
    added = {"content": "<img>", "special": True}
    config = {"added_tokens_decoder": {"320": added}, "additional_special_tokens": ["<img>"], "sep_token": "<s>"}
    write_json(directory / "tokenizer_config.json", config)
    tokenizer = OPTTokenizer.from_pretrained(directory)
    assert (tokenizer.vocab_size, len(tokenizer)) == (320, 322)
    ids = tokenizer("cat<img>cat plain<s>").input_ids
    assert [token for token in ids if token >= 320 or token < 3] == [BOS, 320, 321, 0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "catcat plain"
    assert tokenizer.all_special_ids == [BOS, PAD, 0, 320]


def test_a_special_token_that_the_vocabulary_lacks_is_added_at_its_end(directory):
    write_json(directory / "tokenizer_config.json", {"pad_token": "[PAD]"})
    tokenizer = OPTTokenizer.from_pretrained(directory)
    assert (tokenizer.pad_token_id, len(tokenizer), tokenizer.vocab_size) == (320, 321, 320)


def test_what_was_saved_is_what_was_there(directory, tokenizer, tmp_path):
    write_json(directory / "added_tokens.json", {"plain": 320})
    config = {
        "add_bos_token": False,
        "padding_side": "left",
        "truncation_side": "left",
        "model_max_length": 77,
        "x": [1],
    }
    write_json(
        directory / "tokenizer_config.json", config | {"additional_special_tokens": ["<s>"], "pad_token": "<unk>"}
    )
    first = OPTTokenizer.from_pretrained(directory)
    target = tmp_path / "deep" / "saved"
    paths = first.save_pretrained(target)
    assert sorted(path.name for path in paths) == sorted(path.name for path in target.iterdir())
    texts = ["The cat sat on a plain mat<s>", "</s>"]
    for leave_out in ((), ("tokenizer.json",), ("vocab.json", "merges.txt")):
        for name in leave_out:
            (target / name).rename(target / f"{name}.away")
        second = OPTTokenizer.from_pretrained(target)
        assert second(texts, padding=True) == first(texts, padding=True)
        for name in (
            "special_tokens_map",
            "additional_special_tokens",
            "padding_side",
            "truncation_side",
            "model_max_length",
        ):
            assert getattr(second, name) == getattr(first, name)
        assert second.get_vocab() == first.get_vocab()
        for name in leave_out:
            (target / f"{name}.away").rename(target / name)
    assert json.loads((target / "tokenizer_config.json").read_text())["x"] == [1]
    again = tmp_path / "again"
    OPTTokenizer.from_pretrained(target).save_pretrained(again)
    for path in paths:
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_saving_where_a_file_is(tokenizer, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TokenizerError, match="can't be written: File exists"):
        tokenizer.save_pretrained(tmp_path / "file")


def test_the_saved_tokenizer_json_has_the_prefix(tokenizer, tmp_path):  # transformers#17498
    tokenizer.save_pretrained(tmp_path / "saved")
    alone = Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    assert alone.encode("The cat").ids == tokenizer("The cat").input_ids
    assert alone.encode("The", "cat").ids == tokenizer("The", "cat").input_ids


@pytest.fixture
def json_directory(engine_state, tmp_path) -> Path:
    """A `tokenizer.json` that puts nothing in front of a text."""
    (tmp_path / "tokenizer.json").write_text(engine_state, encoding="utf-8")
    return tmp_path


def test_a_tokenizer_json_that_lost_the_prefix(json_directory):  # transformers#17498, #20823
    config = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "add_bos_token": True}
    write_json(json_directory / "tokenizer_config.json", config)
    assert OPTTokenizer.from_pretrained(json_directory)("cat").input_ids[0] == BOS
    write_json(json_directory / "tokenizer_config.json", {**config, "add_bos_token": None})
    assert OPTTokenizer.from_pretrained(json_directory)("cat").input_ids[0] != BOS
    assert OPTTokenizer.from_pretrained(json_directory, add_bos_token=True)("cat").input_ids[0] == BOS


def test_a_tokenizer_json_with_a_template_of_its_own(engine_state, json_directory):
    engine: Any = Tokenizer.from_str(engine_state)
    engine.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> <s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    engine.save(str(json_directory / "tokenizer.json"))
    write_json(json_directory / "tokenizer_config.json", {"bos_token": "</s>", "eos_token": "</s>"})
    tokenizer = OPTTokenizer.from_pretrained(json_directory)
    bare = tokenizer.encode("The cat", add_special_tokens=False)
    assert tokenizer.add_bos_token is False
    got = tokenizer("The cat", return_special_tokens_mask=True)
    assert got.input_ids == [0, *bare, 2] == engine.encode("The cat").ids
    assert got.special_tokens_mask == [1, *[0] * len(bare), 1]
    assert tokenizer("The cat", truncation=True, max_length=3).input_ids == [0, bare[0], 2]
    tokenizer.save_pretrained(json_directory / "saved")
    assert OPTTokenizer.from_pretrained(json_directory / "saved")("The cat").input_ids == [0, *bare, 2]
    with pytest.raises(TokenizerError, match="max_length is 1, but 2 tokens are put in"):
        tokenizer("The cat", truncation=True, max_length=1)


def test_galactica(engine_state, json_directory):
    """No names of special tokens anywhere but ids in config.json; padding and truncation inside `tokenizer.json`."""
    engine: Any = Tokenizer.from_str(engine_state)
    engine.add_special_tokens([AddedToken("[START_REF]", special=True)])
    engine.enable_padding(pad_id=1, pad_token="<pad>", length=9)
    engine.enable_truncation(5)
    engine.save(str(json_directory / "tokenizer.json"))
    write_json(json_directory / "special_tokens_map.json", {})
    write_json(json_directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "max_position_embeddings": 2048}
    write_json(json_directory / "config.json", ids)
    tokenizer = OPTTokenizer.from_pretrained(json_directory)
    assert tokenizer.special_tokens_map == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    assert (tokenizer.unk_token, tokenizer.model_max_length, tokenizer.add_bos_token) == (None, 2048, False)
    ids = tokenizer("The cat[START_REF] sat on the mat, and the dog").input_ids
    assert ids == tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(ids))
    assert tokenizer.decode(ids) == "The cat[START_REF] sat on the mat, and the dog"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The cat sat on the mat, and the dog"
    assert tokenizer(["", "cat"], padding=True).input_ids[0][0] == PAD


def test_the_longest_text_is_that_of_the_model(directory):
    assert OPTTokenizer.from_pretrained(directory).model_max_length == VERY_LONG
    write_json(directory / "config.json", {"max_position_embeddings": 64})
    assert OPTTokenizer.from_pretrained(directory).model_max_length == 64
    write_json(directory / "tokenizer_config.json", {"model_max_length": 32})
    assert OPTTokenizer.from_pretrained(directory).model_max_length == 32
    assert OPTTokenizer.from_pretrained(directory, model_max_length=8).model_max_length == 8
    for no_limit in ("1e30", "1000000000000000019884624838656"):
        (directory / "tokenizer_config.json").write_text(f'{{"model_max_length": {no_limit}}}')
        assert OPTTokenizer.from_pretrained(directory).model_max_length == VERY_LONG


def test_a_space_in_front_of_every_text(directory):
    write_json(directory / "tokenizer_config.json", {"add_prefix_space": True})
    tokenizer = OPTTokenizer.from_pretrained(directory)
    assert tokenizer.decode(tokenizer("cat").input_ids, skip_special_tokens=True) == " cat"


def test_slow_and_fast_are_the_same(directory, tokenizer):
    for use_fast in (True, False):
        assert OPTTokenizer.from_pretrained(directory, use_fast=use_fast)("The cat") == tokenizer("The cat")


def test_no_tokenizer(tmp_path):
    with pytest.raises(TokenizerError, match=r"No vocab\.json and no merges\.txt in .*or tokenizer\.json"):
        OPTTokenizer.from_pretrained(tmp_path)
    write_json(tmp_path / "vocab.json", {"a": 0})
    with pytest.raises(TokenizerError, match=r"No merges\.txt in "):
        OPTTokenizer.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="There is no directory"):
        OPTTokenizer.from_pretrained(tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("vocab.json", "{", "vocab.json is not readable as JSON"),
        ("vocab.json", "[" * 100_000, "vocab.json is not readable as JSON"),
        ("vocab.json", "[]", "vocab.json: expected a JSON object, got list"),
        ("vocab.json", "{}", "expected a different id, an integer from 0, for every token"),
        ("vocab.json", '{"a": 0, "b": 0}', "expected a different id"),
        ("vocab.json", '{"a": -1}', "expected a different id"),
        ("vocab.json", '{"a": true}', "expected a different id"),
        ("vocab.json", '{"a": 4294967296}', "expected a different id"),
        ("merges.txt", "#version: 0.2\na b c\n", "merges.txt, line 2: got 'a b c', expected two tokens"),
        ("merges.txt", "a b\nab\n", "merges.txt, line 2: got 'ab'"),
        ("merges.txt", "\u00a3 \u00a4\n", "merges.txt does not fit vocab.json"),
        ("tokenizer.json", "{}", "tokenizer.json is no tokenizer"),
        ("tokenizer.json", None, "tokenizer.json holds a WordLevel model, expected the BPE"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: expected a JSON object"),
        ("tokenizer_config.json", '{"errors": "strict"}', "has errors 'strict', expected 'replace'"),
        ("tokenizer_config.json", '{"add_bos_token": 1}', "has add_bos_token 1, expected true or false"),
        ("tokenizer_config.json", '{"padding_side": "up"}', "has padding_side 'up', expected left or right"),
        ("tokenizer_config.json", '{"model_max_length": 0}', "has model_max_length 0, expected a positive number"),
        ("tokenizer_config.json", '{"model_max_length": NaN}', "has model_max_length nan, expected a positive number"),
        ("tokenizer_config.json", '{"bos_token": 5}', "bos_token is 5, expected a text or an object"),
        (
            "tokenizer_config.json",
            '{"bos_token": {"content": "a", "lstrip": 1}}',
            "expected flags that are true or false",
        ),
        ("tokenizer_config.json", '{"additional_special_tokens": "<s>"}', "is '<s>', expected a list"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "a"}}', "expected integers"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "added_tokens_decoder is .*, expected an object"),
        ("added_tokens.json", '{"plain": 999}', "adds 'plain' as id 999, but by its vocabulary that token is 320"),
        ("added_tokens.json", '{"</s>": 7}', "adds '</s>' as id 7, but by its vocabulary that token is 2"),
    ],
)
def test_damaged_files(directory, name, content, text):
    if content is None:
        content = Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str()
    (directory / name).write_text(content, encoding="utf-8")
    with pytest.raises(TokenizerError, match=text) as error:
        OPTTokenizer.from_pretrained(directory)
    assert "\n" not in str(error.value)


def test_files_with_windows_line_ends(directory, tokenizer):
    path = directory / "merges.txt"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert OPTTokenizer.from_pretrained(directory)("The cat sat") == tokenizer("The cat sat")


@pytest.mark.skipif("torch" not in BACKENDS, reason="torch is not under test")
def test_the_script_of_the_documentation(directory):
    from opt_common.tokenizer import OPTTokenizer as GPT2Tokenizer

    tokenizer = GPT2Tokenizer.from_pretrained(str(directory))
    prompt = "A chat between a curious human and the Statue of Liberty.\n\nHuman: What is your name?"
    with warnings.catch_warnings(action="error"):
        model_inputs = tokenizer([prompt], return_tensors="pt").to("cpu")
        generated_ids = dict(**model_inputs)["input_ids"]
        assert tokenizer.batch_decode(generated_ids)[0] == "</s>" + prompt
