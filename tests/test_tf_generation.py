"""How TensorFlow's decoder compiles its steps: without a copy of the cache, and no oftener than it must."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from opt_common.native import library
from opt_tf import TFOPTForCausalLM, generation, native

Step = Callable[..., Any]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, tuple[Any, ...]]]:
    """The compiled functions that a decoder asks for, with their arguments."""
    found: list[tuple[Any, tuple[Any, ...]]] = []
    compiled_step = generation._compiled_step

    class Recorded:
        def __init__(self, step: Any) -> None:
            self.step = step

        def get_concrete_function(self, *arguments: Any) -> Step:
            found.append((self.step, arguments))
            return self.step.get_concrete_function(*arguments)

    monkeypatch.setattr(generation, "_compiled_step", lambda *given: Recorded(compiled_step(*given)))
    return found


def generated(**options: Any) -> np.ndarray:
    model = TFOPTForCausalLM.from_pretrained("opt-tiny", dtype="float32")
    return np.asarray(model.generate(np.array([[2, 100, 101, 102]]), do_sample=False, **options))


@pytest.mark.skipif(library() is None, reason="built without a C compiler, or switched off")
def test_a_token_is_written_without_a_copy_of_the_cache(asked: list[tuple[Any, tuple[Any, ...]]]) -> None:
    assert native.is_registered()
    generated(max_new_tokens=6)
    step, arguments = asked[-1]
    keys = arguments[2]
    assert all(isinstance(each, tf.Variable) for each in keys)
    program = step.experimental_get_compiler_ir(*arguments)(stage="optimized_hlo")
    shape = "f32[{}]".format(",".join(map(str, keys[0].shape)))
    copies = [line.strip() for line in program.splitlines() if f"= {shape}" in line and " copy(" in line]
    assert shape in program
    assert not copies


def test_steps_are_compiled_once_for_a_prompt_and_once_for_a_token(asked: list[tuple[Any, tuple[Any, ...]]]) -> None:
    text = generated(max_new_tokens=12)
    assert len(asked) == 2
    assert text.shape == (1, 16)


def test_steps_run_eagerly_where_functions_are_to(monkeypatch: pytest.MonkeyPatch) -> None:
    selected: list[object] = []
    select = generation.select

    def recorded(*arguments: Any, **options: Any) -> Any:
        selected.append(arguments)
        return select(*arguments, **options)

    monkeypatch.setattr(generation, "select", recorded)
    compiled = generated(max_new_tokens=5)
    assert len(selected) == 2  # traced
    selected.clear()
    tf.config.run_functions_eagerly(True)
    try:
        eager = generated(max_new_tokens=5)
    finally:
        tf.config.run_functions_eagerly(False)
    assert len(selected) == 5
    np.testing.assert_array_equal(eager, compiled)
