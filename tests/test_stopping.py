"""What ends a row beside an id: its rules, apart from any model."""

import time

import numpy as np
import pytest

from opt_common.errors import GenerationError
from opt_common.generation_config import GenerationConfig
from opt_common.stopping import read_stopping
from opt_common.tokenizer import OPTTokenizer

IDS = np.array([[1, 5, 6], [7, 8, 2], [9, 9, 3]])


def stopping(criteria=None, tokenizer=None, **settings):
    return read_stopping(GenerationConfig(**settings), tokenizer, criteria, np.asarray)


def test_several_ids_end_a_row():
    assert stopping(eos_token_id=[2, 3]).ended(IDS).tolist() == [False, True, True]
    assert not stopping().ended(IDS).any()
    assert not stopping(eos_token_id=2).reads_text


def test_a_user_s_rule_has_either_form():
    """Ids alone, or ids and scores as in Hugging Face; one answer for all rows, or one for each."""

    class Class:
        def __call__(self, input_ids, scores, **kwargs):
            assert scores is None
            return input_ids[:, -1] == 3

    assert stopping(lambda ids: ids[:, -1] == 6).ended(IDS).tolist() == [True, False, False]
    assert stopping(lambda ids, limit=3: ids.shape[1] >= limit).ended(IDS).all()
    assert stopping([lambda ids: False, Class()], eos_token_id=2).ended(IDS).tolist() == [False, True, True]
    for answer in (None, 1, np.array([True, False])):
        with pytest.raises(GenerationError, match="expected True or False"):
            stopping(lambda ids, answer=answer: answer).ended(IDS)
    with pytest.raises(GenerationError, match="stopping_criteria has a int"):
        stopping([3])


def test_time_ends_every_row():
    rule = stopping(max_time=0.05)
    assert not rule.ended(IDS).any()
    time.sleep(0.06)
    assert rule.ended(IDS).all()


def test_stop_strings_need_the_tokenizer():
    with pytest.raises(GenerationError, match="Pass tokenizer="):
        stopping(stop_strings="end")
    tokenizer = OPTTokenizer.from_pretrained("opt-tiny")
    rows = tokenizer(["the end", "an end.", "endless"], padding=True, padding_side="left", return_tensors="np")
    found = stopping(tokenizer=tokenizer, stop_strings=["n end", "d."]).ended(rows["input_ids"])
    assert found.tolist() == [tokenizer.decode(row)[-1] in "." for row in rows["input_ids"]]


@pytest.mark.parametrize("settings", [{"stop_strings": [""]}, {"stop_strings": [1]}, {"max_time": 0}])
def test_what_cannot_stop_anything(settings):
    with pytest.raises(GenerationError, match=f"{next(iter(settings))} is"):
        GenerationConfig(**settings)
