"""One system in one process: loads a checkpoint, and does on command what `speed.py` times.

Commands come as JSON lines on standard input, answers go as JSON lines to standard output: the driver takes turns
between the processes, so that a slow minute of the machine is everybody's.

A system is named FRAMEWORK[@FORMAT][:DTYPE[:QUANTIZATION]], such as "opt_torch:float32:int8-dynamic"; of PyTorch, the
last may be "packed", which `opt-torch` does to bfloat16 by itself. Peers are
"hf_torch", "hf_tf", "hf_flax", "keras_hub_tf", "keras_hub_jax" and "ct2", each with a dtype of its own.
"""

import functools
import importlib
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from opt_common.encoding import tensor_maker
from opt_common.workloads import Bandwidth, Workload, seconds_of

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")


VOCABULARY = 50000
"""Prompts have smaller ids."""


class System(Protocol):
    """What each system can do. Prompts are (B, T) of ids without padding."""

    def generate(self, prompts_BT: np.ndarray, new_tokens: int) -> Any:
        """Continue greedily by exactly so many tokens."""
        ...

    def train(self, ids_BT: np.ndarray) -> float:
        """One step of AdamW on the mean cross-entropy of the next token; the loss."""
        ...


class Opt:
    """This package, in one of its frameworks."""

    def __init__(self, package: str, path: Path, dtype: str = "float32", quantization: str | None = None) -> None:
        self.program = importlib.import_module(f"{package}.cli").program()
        self.tensor = tensor_maker(self.program.tensors)
        self.dtype = dtype
        packed = quantization == "packed"
        self.model: Any = self.program.load(str(path), dtype=dtype, quantization=None if packed else quantization)
        if packed:
            from opt_torch.packed import pack

            pack(self.model)
        self.step: Any = None

    def generate(self, prompts_BT: np.ndarray, new_tokens: int) -> Any:
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        return np.asarray(self.model.generate(self.tensor(prompts_BT), **options))

    def train(self, ids_BT: np.ndarray) -> float:
        if self.step is None:
            # A model of its own takes this one's place: two would not fit everywhere.
            config, self.model = self.model.config, None
            self.step = self.program.trainer(config, self.dtype)
        return self.step(ids_BT)


class HfTorch:
    """transformers in PyTorch; training in bfloat16 is its autocast."""

    def __init__(self, path: Path, dtype: str = "float32") -> None:
        import torch
        from transformers import OPTForCausalLM  # pyright: ignore[reportMissingImports]

        self.torch = torch
        self.dtype = getattr(torch, dtype)
        self.model = OPTForCausalLM.from_pretrained(path, dtype=self.dtype).eval()
        self.optimizer: Any = None

    def generate(self, prompts_BT: np.ndarray, new_tokens: int) -> Any:
        ids = self.torch.from_numpy(prompts_BT)
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        with self.torch.no_grad():
            return self.model.generate(ids, attention_mask=self.torch.ones_like(ids), **options).numpy()

    def train(self, ids_BT: np.ndarray) -> float:
        if self.optimizer is None:
            self.model = self.model.float().train()
            self.optimizer = self.torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        ids = self.torch.from_numpy(ids_BT)
        with self.torch.autocast("cpu", self.torch.bfloat16, enabled=self.dtype == self.torch.bfloat16):
            loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class HfTf:
    """transformers 4.57 in TensorFlow (TF_USE_LEGACY_KERAS=1), its generation compiled by XLA."""

    def __init__(self, path: Path, dtype: str = "float32") -> None:
        import tensorflow as tf
        from transformers import TFOPTForCausalLM  # pyright: ignore[reportMissingImports]

        assert dtype == "float32"
        self.tf = tf
        self.model = TFOPTForCausalLM.from_pretrained(path)
        self.compiled = tf.function(self.model.generate, jit_compile=True)
        # Its generate refuses to make a single token under XLA.
        self.first = tf.function(lambda ids: tf.argmax(self.model(ids).logits[:, -1], axis=-1), jit_compile=True)

    def generate(self, prompts_BT: np.ndarray, new_tokens: int) -> Any:
        ids = self.tf.constant(prompts_BT, self.tf.int32)
        if new_tokens == 1:
            return self.first(ids).numpy()
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        return self.compiled(ids, attention_mask=self.tf.ones_like(ids), **options).numpy()


class HfFlax:
    """transformers 4.57 in Flax: its model and cache in a jitted step, for its generate fails on the JAX it needs."""

    def __init__(self, path: Path, dtype: str = "float32") -> None:
        import jax
        from transformers import FlaxOPTForCausalLM  # pyright: ignore[reportMissingImports]

        assert dtype == "float32"
        self.jax = jax
        self.model = FlaxOPTForCausalLM.from_pretrained(path)
        self.step: Any = None

        def forward(params: Any, ids_BT: Any, mask_BS: Any, positions_BT: Any, cache: Any) -> Any:
            output = self.model(
                ids_BT, attention_mask=mask_BS, position_ids=positions_BT, params=params, past_key_values=cache
            )
            return output.logits[:, -1].argmax(-1)[:, None], output.past_key_values

        self.forward = jax.jit(forward, donate_argnums=(4,))

    def generate(self, prompts_BT: np.ndarray, new_tokens: int) -> Any:
        B, T = prompts_BT.shape
        cache, mask_BS = self.model.init_cache(B, T + new_tokens), np.ones((B, T + new_tokens), np.int32)
        found, positions_BT = prompts_BT, np.broadcast_to(np.arange(T), (B, T))
        chosen = []
        for position in range(T, T + new_tokens):
            found, cache = self.forward(self.model.params, found, mask_BS, positions_BT, cache)
            chosen.append(found)
            positions_BT = np.full((B, 1), position)
        return np.concatenate([np.asarray(ids_B1) for ids_B1 in chosen], axis=1)

    def train(self, ids_BT: np.ndarray) -> float:
        import jax.numpy as jnp
        import optax

        if self.step is None:
            optimizer = optax.adamw(1e-5)
            self.params, self.state = self.model.params, optimizer.init(self.model.params)

            def loss_of(params: Any, ids: Any, key: Any) -> Any:
                logits = self.model(ids, params=params, dropout_rng=key, deterministic=False).logits[:, :-1]
                return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), ids[:, 1:]).mean()

            def step(params: Any, state: Any, ids: Any, key: Any) -> Any:
                loss, gradients = self.jax.value_and_grad(loss_of)(params, ids, key)
                updates, state = optimizer.update(gradients, state, params)
                return optax.apply_updates(params, updates), state, loss

            self.step = self.jax.jit(step, donate_argnums=(0, 1))
        key = self.jax.random.key(0)
        self.params, self.state, loss = self.step(self.params, self.state, ids_BT, key)
        return float(loss)


class KerasHub:
    """KerasHub, on the backend that the environment variable KERAS_BACKEND names."""

    def __init__(self, path: Path, dtype: str = "float32") -> None:
        import keras_hub  # pyright: ignore[reportMissingImports]

        config = json.loads((path / "config.json").read_text())
        backbone = keras_hub.models.OPTBackbone(
            vocabulary_size=config["vocab_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            hidden_dim=config["hidden_size"],
            intermediate_dim=config["ffn_dim"],
            max_sequence_length=config["max_position_embeddings"],
            dtype=dtype,
        )
        self.model = keras_hub.models.OPTCausalLM(backbone, preprocessor=None)
        self.compiled = False

    def generate(self, prompts_BT: np.ndarray, new_tokens: int) -> Any:
        B, T = prompts_BT.shape
        ids = np.ones((B, T + new_tokens), np.int32)
        ids[:, :T] = prompts_BT
        mask = np.zeros((B, T + new_tokens), bool)
        mask[:, :T] = True
        return self.model.generate({"token_ids": ids, "padding_mask": mask}, stop_token_ids=None)

    def train(self, ids_BT: np.ndarray) -> float:
        import keras

        if not self.compiled:
            self.model.compile(
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                optimizer=keras.optimizers.AdamW(1e-5, weight_decay=0.01),
                sampler="greedy",
            )
            self.compiled = True
        inputs = {"token_ids": ids_BT[:, :-1], "padding_mask": np.ones_like(ids_BT[:, :-1])}
        return float(self.model.train_on_batch(inputs, ids_BT[:, 1:])[0])


class CTranslate2:
    """CTranslate2; `path` is what its own converter made."""

    def __init__(self, path: Path, dtype: str = "float32") -> None:
        import ctranslate2  # pyright: ignore[reportMissingImports]

        threads = len(os.sched_getaffinity(0))
        self.vocabulary = json.loads((path / "vocabulary.json").read_text())
        self.model = ctranslate2.Generator(str(path), compute_type=dtype, intra_threads=threads, inter_threads=1)

    def generate(self, prompts_BT: np.ndarray, new_tokens: int) -> Any:
        prompts = [[self.vocabulary[token] for token in row] for row in prompts_BT]
        options = {"max_length": new_tokens, "min_length": new_tokens, "include_prompt_in_result": False}
        return self.model.generate_batch(prompts, sampling_topk=1, max_batch_size=0, **options)


class Limit:
    """What the machine can do at best: read memory, and multiply matrices of 4096."""

    def __init__(self, path: Path, dtype: str = "float32") -> None:
        import torch

        self.torch = torch
        self.memory = Bandwidth()
        self.matrix = torch.randn(4096, 4096)
        del path, dtype

    def measure(self) -> dict[str, float]:
        """Bytes read and float32 operations a second, the better of MKL and oneDNN."""
        with self.torch.no_grad():
            products = [seconds_of(lambda: self.matrix @ self.matrix)]
            if hasattr(self.torch.ops.mkldnn, "_linear_pointwise"):
                multiply = self.torch.ops.mkldnn._linear_pointwise
                products.append(seconds_of(lambda: multiply(self.matrix, self.matrix, None, "none", [], "")))
        return {"bytes_per_s": self.memory.measure(), "flops_per_s": 2 * 4096**3 / min(products)}


SYSTEMS = {
    "limit": Limit,
    "opt_torch": functools.partial(Opt, "opt_torch"),
    "opt_tf": functools.partial(Opt, "opt_tf"),
    "opt_flax": functools.partial(Opt, "opt_flax"),
    "hf_torch": HfTorch,
    "hf_tf": HfTf,
    "hf_flax": HfFlax,
    "keras_hub_tf": KerasHub,
    "keras_hub_jax": KerasHub,
    "ct2": CTranslate2,
}


IMPORTS = {
    "limit": "torch",
    "hf_torch": "transformers.models.opt.modeling_opt",
    "hf_tf": "transformers.models.opt.modeling_tf_opt",
    "hf_flax": "transformers.models.opt.modeling_flax_opt",
    "keras_hub_tf": "keras_hub",
    "keras_hub_jax": "keras_hub",
    "ct2": "ctranslate2",
}
"""What a user of a system imports; of this package, the module of the models."""


def answer(system: Any, command: dict[str, Any]) -> dict[str, Any]:
    """Do one command, and say how long it took."""
    if command["workload"] == "limit":
        return system.measure()
    workload = Workload.parse(command["workload"])
    ids_BT = workload.prompts(VOCABULARY, command["seed"])
    if workload.kind == "train":
        return {"seconds": seconds_of(lambda: system.train(ids_BT))}
    return {"seconds": seconds_of(lambda: system.generate(ids_BT, workload.new_tokens))}


def main() -> None:
    """Serve one system until standard input ends."""
    name, path = sys.argv[1], Path(sys.argv[2])
    # Whatever a framework prints goes to standard error: standard output is for answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    kind, *options = name.split(":")
    kind = kind.partition("@")[0]
    system: Any = None

    def load() -> None:
        nonlocal system
        system = SYSTEMS[kind](path, *options)

    start = {
        "import": seconds_of(lambda: importlib.import_module(IMPORTS.get(kind, f"{kind}.modeling"))),
        "load": seconds_of(load),
    }
    print(json.dumps(start), file=answers)
    for line in sys.stdin:
        try:
            reply = answer(system, json.loads(line))
        except (NotImplementedError, AttributeError) as error:
            reply = {"error": str(error)}
        reply["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(reply), file=answers)


if __name__ == "__main__":
    main()
