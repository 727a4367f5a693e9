"""Text in pieces: never half a character, nothing of a stop string, and joined the text of all ids at once."""

import gzip
import json
import random
import threading

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from opt_common.errors import GenerationError, TokenizerError
from opt_common.stopping import StopStrings
from opt_common.streaming import TextDecoder, TextIteratorStreamer, TextStreamer
from opt_common.tokenizer import OPTTokenizer
from tests.paths import GOLDENS

LETTERS = "aZ 09.,!?'\n\téßñЖљעשدह中文字한글ﷺ€→😀👩🏽👨\u200d👩\u200d👧🇩🇪e\u0301\u2028\ufffd\x00\x1f"


@pytest.fixture(scope="module")
def tokenizer():
    return OPTTokenizer.from_pretrained("opt-tiny")


def thousand_texts():
    """The tokenizer's goldens, and random texts of one to four bytes a character."""
    with gzip.open(GOLDENS / "tokenizer" / "tokenizer_goldens.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    generator = random.Random(0)
    texts += ["".join(generator.choices(LETTERS, k=generator.randrange(1, 30))) for _ in range(1000 - len(texts))]
    assert len(texts) == 1000
    return texts


def pieces_of(decoder, ids):
    return [*(decoder.push([token]) for token in ids), decoder.finish()]


@pytest.mark.parametrize("options", [{}, {"skip_special_tokens": True}, {"clean_up_tokenization_spaces": True}])
def test_the_pieces_of_a_thousand_texts_join_to_the_text(tokenizer, options):
    held_back = 0
    for text in thousand_texts():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = pieces_of(TextDecoder(tokenizer, **options), ids)
        assert "".join(pieces) == tokenizer.decode(ids, **options)
        if "\ufffd" not in text:
            assert "\ufffd" not in "".join(pieces), "no piece has half a character"
        held_back += sum(not piece for piece in pieces[:-1])
    assert held_back > 1000, "characters of several tokens must have come up"


def test_bytes_that_are_no_character(tokenizer):
    """Ids that no text has, ids that no token has: as `decode` shows them."""
    generator = random.Random(1)
    for _ in range(300):
        ids = [generator.randrange(len(tokenizer) + 20) for _ in range(12)]
        for skip in (False, True):
            pieces = pieces_of(TextDecoder(tokenizer, skip_special_tokens=skip), ids)
            assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_a_stop_string_ends_the_text_right_before_it(tokenizer):
    """Held against the definition: cut the text of all ids so far where a stop string first occurs in it."""
    generator = random.Random(2)
    stopped = spanning = 0
    for _ in range(900):
        text = "".join(generator.choices("ab é😀\n", k=20))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        split = generator.randrange(len(ids))
        stops = ["".join(generator.choices("ab é😀\n", k=generator.randrange(2, 5))) for _ in range(2)]
        rule = StopStrings(stops, tokenizer)
        last = next((place for place in range(split, len(ids)) if rule.completed(ids[: place + 1])), None)
        decoder = TextDecoder(tokenizer, stop_strings=stops, prompt=ids[:split])
        found = "".join(pieces_of(decoder, ids[split:]))
        assert decoder.stopped == (last is not None)

        prompt = tokenizer.engine.decode(ids[:split], skip_special_tokens=False).encode()
        if "\ufffd" in prompt.decode():
            continue  # the prompt ends in the middle of a character: its text is no prefix of the whole
        ends = [place for place in range(split, len(ids)) if completes(tokenizer, ids, place, stops)]
        assert last == (ends[0] if ends else None)
        if last is None:
            assert found == tokenizer.decode(ids[split:])
            continue
        stopped += 1
        whole = tokenizer.decode(ids[: last + 1]).rstrip("\ufffd").encode()
        starts = [whole.find(stop, max(len(prompt) - len(stop) + 1, 0)) for stop in map(str.encode, stops)]
        cut = min(start for start in starts if start >= 0)
        spanning += cut < len(prompt)
        assert found.encode() == whole[len(prompt) : max(cut, len(prompt))]
    assert stopped > 100
    assert spanning > 4


def completes(tokenizer, ids, place, stops):
    """Whether a stop string ends inside the token at a place."""
    before, after = (tokenizer.decode(ids[:end]).rstrip("\ufffd") for end in (place, place + 1))
    return any(stop in after[max(len(before) - len(stop) + 1, 0) :] for stop in stops)


def test_a_stop_string_may_be_a_special_token_or_half_a_token(tokenizer):
    ids = tokenizer("One day", add_special_tokens=False)["input_ids"]
    decoder = TextDecoder(tokenizer, skip_special_tokens=True, stop_strings=["</s>"])
    assert "".join(pieces_of(decoder, [*ids, 2, *ids])) == "One day"
    decoder = TextDecoder(tokenizer, stop_strings=["ne d"])
    assert "".join(pieces_of(decoder, ids)) == "O"
    assert decoder.stopped
    assert not StopStrings(["ne d"], tokenizer).completed(ids[:1])


def test_what_may_begin_a_stop_string_is_held_back_and_given_in_the_end(tokenizer):
    ids = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "xabcab"]
    decoder = TextDecoder(tokenizer, stop_strings=["abz", "abce"])
    assert [decoder.push([token]) for token in ids] == ["x", "", "", "", "abc", ""]
    assert decoder.finish() == "ab"
    assert not decoder.stopped


def test_streamers_take_what_hugging_face_s_take(tokenizer, capsys):
    """The prompts' ids first, (1, T), then (1,) a token; a line break at the end, and ready for the next text."""
    ids = tokenizer("One day, 😀 there was")["input_ids"]
    for skip_prompt, shown in ((False, "One day, 😀 there was\n"), (True, tokenizer.decode(ids[4:]) + "\n")):
        streamer = TextStreamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        for _ in range(2):
            streamer.put(np.array([ids[:4]]))
            for token in ids[4:]:
                streamer.put(np.array([token]))
            streamer.end()
            assert capsys.readouterr().out == shown
    with pytest.raises(GenerationError, match="takes one text, got 2"):
        TextStreamer(tokenizer).put(np.array([[1, 2], [3, 4]]))


def test_another_thread_reads_the_pieces(tokenizer):
    ids = tokenizer("One day, 😀 there was")["input_ids"]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=10)

    def produce():
        streamer.put(np.array([ids[:1]]))
        for token in ids[1:]:
            streamer.put(np.array([token]))
        streamer.end()

    thread = threading.Thread(target=produce)
    thread.start()
    assert "".join(streamer) == "One day, 😀 there was"
    thread.join()


def test_tokens_that_are_no_bytes_are_refused():
    engine = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "<pad>": 2}, unk_token="a"))
    with pytest.raises(TokenizerError, match="not bytes"):
        TextDecoder(OPTTokenizer(engine))
