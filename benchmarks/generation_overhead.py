"""What the loop of generation costs: time per token of `generate`, beside the bare step of the model.

    python -m benchmarks.generation_overhead torch --json overhead.json

The bare step is the decoder, the head and the likeliest token, compiled where the framework compiles and recorded in
PyTorch, called in a plain loop with nothing around it. Both read one token at the same length of text, in turns, so
that a busy machine slows both alike. Two clocks tell the time: the one on the wall, and the processor time that the
process took, which says more where others use the machine too. Weights are random: speed does not depend on what the
numbers are.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from opt_common import OPTConfig
from opt_common.generation import bucket, token_steps
from opt_common.native import decoding

PROMPT = 32
"""Tokens of the prompt."""

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "seed": 0, "top_k": 50, "top_p": 0.9, "temperature": 0.8},
}
"""What is timed against the bare step. Sampling's own arithmetic over the vocabulary counts as the loop's."""


def torch_model(config: OPTConfig) -> tuple[Any, Any, Callable[[int], Iterator[int]]]:
    """PyTorch's model, its module of generation, and the bare loop for a number of tokens."""
    import torch

    import opt_torch.generation as module
    from opt_torch import OPTForCausalLM
    from opt_torch.cache import KVCache
    from opt_torch.processors import likeliest
    from opt_torch.recorded_step import RecordedStep

    model = OPTForCausalLM(config).eval()

    def bare(new_tokens: int) -> Iterator[int]:
        cache = KVCache.allocate(config, 1, PROMPT + new_tokens)
        step: RecordedStep | None = None
        ids = torch.full((1, PROMPT), 5)
        while True:
            with torch.no_grad():
                if ids.shape[1] > 1:
                    outputs = model.model.decoder(ids, past_key_values=cache, use_cache=True)
                elif step is None:
                    step = RecordedStep(model.model.decoder, cache, None, ids)
                    outputs = step.outputs(cache)
                else:
                    outputs = step(ids, cache)
                cache: Any = outputs.past_key_values
                token = int(likeliest(model.logits(outputs.last_hidden_state[:, -1]))[0])
            yield token
            ids = torch.tensor([[token]])

    return model, module, bare


def tf_model(config: OPTConfig) -> tuple[Any, Any, Callable[[int], Iterator[int]]]:
    """TensorFlow's; see `torch_model`."""
    import tensorflow as tf

    import opt_tf.generation as module
    from opt_tf import TFOPTForCausalLM
    from opt_tf.cache import KVCache
    from opt_tf.processors import likeliest

    model = TFOPTForCausalLM(config)

    @tf.function(jit_compile=True, autograph=False)
    @decoding()
    def step(keys: Any, values: Any, length: Any, mask: Any, ids: Any) -> Any:
        given = KVCache(keys, values, length)
        options = {"attention_mask": mask, "past_key_values": given.in_tensors(), "use_cache": True}
        outputs = model.model.decoder(ids, **options)
        given.assign(outputs.past_key_values)
        return likeliest(model.logits(outputs.last_hidden_state[:, -1]))

    def bare(new_tokens: int) -> Iterator[int]:
        capacity = bucket(bucket(PROMPT) + new_tokens)
        cache = KVCache.allocate(config, 1, capacity).in_variables()
        mask = tf.ones((1, capacity), tf.int32)
        ids, length = np.full((1, PROMPT), 5, np.int32), 0
        while True:
            token = step(cache.keys, cache.values, tf.constant(length), mask, tf.constant(ids))
            length += ids.shape[1]
            ids = token.numpy()[:, None]
            yield int(ids[0, 0])

    return model, module, bare


def flax_model(config: OPTConfig) -> tuple[Any, Any, Callable[[int], Iterator[int]]]:
    """JAX's; see `torch_model`."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import opt_flax.generation as module
    from opt_flax import FlaxOPTForCausalLM
    from opt_flax.cache import KVCache
    from opt_flax.processors import likeliest

    model = FlaxOPTForCausalLM(config, rngs=nnx.Rngs(0))
    model.eval()
    graphdef, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)

    @decoding()
    def one_step(leaves: Any, cache: Any, mask: Any, ids: Any) -> Any:
        model = nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))
        outputs = model.model.decoder(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        return likeliest(model.logits(outputs.last_hidden_state[:, -1])), outputs.past_key_values

    step = jax.jit(one_step, donate_argnums=1)

    def bare(new_tokens: int) -> Iterator[int]:
        capacity = bucket(bucket(PROMPT) + new_tokens)
        cache, mask = KVCache.allocate(config, 1, capacity), jnp.ones((1, capacity), jnp.int32)
        ids = np.full((1, PROMPT), 5, np.int32)
        while True:
            token, cache = step(leaves, cache, mask, ids)
            ids = np.asarray(token, np.int32)[:, None]
            yield int(ids[0, 0])

    return model, module, bare


MODELS = {"torch": torch_model, "tf": tf_model, "flax": flax_model}


def measure(framework: str, size: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Median seconds a token of the bare step and of each setting, and what the loop adds."""
    import contextlib

    model, module, bare = MODELS[framework](OPTConfig.from_size(size))
    around = getattr(module, "evaluating", lambda *_: contextlib.nullcontext())

    def loop(settings: dict[str, Any]) -> Iterator[Any]:
        options, prompt = module.prepare(
            model, np_array(framework, np.full((1, PROMPT), 5)), max_new_tokens=tokens, eos_token_id=[], **settings
        )
        return token_steps(module.Decoder(model, prompt), prompt, options)

    found: dict[str, Any] = {"framework": framework, "size": size, "tokens": tokens, "rounds": rounds}
    for name, settings in SETTINGS.items():
        times: dict[str, list[tuple[float, float]]] = {"bare": [], "loop": []}
        for number in range(rounds + 1):
            sides: dict[str, Iterator[Any]] = {"bare": bare(tokens), "loop": loop(settings)}
            for token in range(tokens):
                for side, steps in sides.items():
                    begin = time.perf_counter(), time.process_time()
                    with around(model, model.generation_config):
                        next(steps)
                    # The first round compiles, and the first token reads the prompt.
                    if number and token:
                        times[side].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
        found[name] = {}
        for place, clock in enumerate(("wall", "processor")):
            medians = {side: statistics.median(pair[place] for pair in pairs) for side, pairs in times.items()}
            found[name][clock] = {**medians, "overhead": medians["loop"] / medians["bare"] - 1}
    return found


def np_array(framework: str, array: np.ndarray) -> Any:
    """Ids as the framework takes them."""
    if framework == "torch":
        import torch

        return torch.from_numpy(array)
    return array


def main() -> None:
    """Measure one framework, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", choices=MODELS)
    parser.add_argument("--size", default="125m", help="shape of a released model (default 125m)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a round (default 64)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count (default 3)")
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    found = measure(arguments.framework, arguments.size, arguments.tokens, arguments.rounds)
    print(f"{'':10}{'clock':>11}{'bare step':>12}{'generate':>12}{'overhead':>10}")
    for name in SETTINGS:
        for clock, row in found[name].items():
            bare, loop = (f"{row[side] * 1e3:9.2f} ms" for side in ("bare", "loop"))
            print(f"{name:10}{clock:>11}{bare}{loop}{row['overhead']:10.1%}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
