"""The only code of the tests that knows a framework: one adapter each, with the same methods, NumPy in and NumPy out.

A framework is imported when its adapter is made, so that a test run over one framework needs no other.
"""

import contextlib
import dataclasses
import gc
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from opt_common.config import OPTConfig
from opt_common.params import Head, Parameter, Scheme, parameter_table
from opt_common.processors import program

BACKENDS = tuple(name for name in os.environ.get("OPT_TEST_BACKENDS", "torch,tf,flax").split(",") if name)
"""The frameworks under test. One that is named and not installed makes its tests fail."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Results:
    """A model call's results as NumPy arrays; half precision is widened to float32. The cache stays the framework's."""

    logits: np.ndarray | None = None
    start_logits: np.ndarray | None = None
    end_logits: np.ndarray | None = None
    loss: np.ndarray | None = None
    last_hidden_state: np.ndarray | None = None
    hidden_states: tuple[np.ndarray, ...] | None = None
    attentions: tuple[np.ndarray, ...] | None = None
    cache: Any = None


class Adapter:
    """What the three adapters share. `lm` and `bare` are the backend's classes, `package` its package.

    `heads` has the classes with other heads.
    """

    name: str
    scheme: Scheme
    package: Any
    lm: Any
    bare: Any
    heads: Mapping[Head | None, Any]
    compiles = True  # whether generation runs a compiled step
    id_dtype = np.int32  # of ids inside generation

    # Making models

    def load(
        self, path: Path, *, dtype: str = "float32", bare: bool = False, head: Head | None = None, **options: Any
    ) -> Any:
        """A model from a checkpoint, for evaluation."""
        with self.precision(dtype):
            return self.model_class(bare, head).from_pretrained(path, dtype=dtype, **options)

    def model_class(self, bare: bool, head: Head | None) -> Any:
        """The language model's class, unless another one is asked for."""
        return self.heads[head] if head else self.bare if bare else self.lm

    def build(self, config: OPTConfig, *, dtype: str = "float32", bare: bool = False, head: Head | None = None) -> Any:
        """A model with new random weights, for evaluation."""
        raise NotImplementedError

    def precision(self, dtype: str) -> contextlib.AbstractContextManager[Any]:
        """The state of the framework in which this dtype can be computed with."""
        del dtype
        return contextlib.nullcontext()

    # Parameters

    def parameter(self, model: Any, parameter: Parameter) -> Any:
        """The framework's variable of a canonical parameter."""
        path = parameter.path(self.scheme)
        return walk(model, path[1:] if model.head is None else path)

    def get(self, model: Any, parameter: Parameter) -> np.ndarray:
        """A parameter's value in canonical layout."""
        value = self.array(self.parameter(model, parameter))
        return value.T if parameter.transposed(self.scheme) else value

    def set(self, model: Any, parameter: Parameter, value: np.ndarray) -> None:
        """Give a parameter another value, in canonical layout."""
        value = np.ascontiguousarray(value.T if parameter.transposed(self.scheme) else value)
        self.assign(self.parameter(model, parameter), value)

    def table(self, model: Any) -> tuple[Parameter, ...]:
        """The parameters that a model of this configuration has."""
        return parameter_table(model.config, head=model.head)

    def parameters(self, model: Any) -> dict[str, np.ndarray]:
        """All parameters: canonical name -> value in canonical layout."""
        return {parameter.name: self.get(model, parameter) for parameter in self.table(model)}

    def assign(self, variable: Any, value: np.ndarray) -> None:
        """Write a variable."""
        raise NotImplementedError

    def count(self, model: Any) -> int:
        """Number of elements in all of the model's trainable parameters, as the framework counts them."""
        raise NotImplementedError

    # Saving as the framework does

    def native_saves(self, model: Any) -> dict[str, Callable[[Path], Any]]:
        """The framework's own functions that save a model: the name of what they write -> one that writes it there."""
        raise NotImplementedError

    # Computing

    def forward(self, model: Any, *, training: bool = False, checked: bool = False, **arguments: Any) -> Results:
        """A model call. Arrays are NumPy; other arguments go through as they are.

        `checked` asks for the call as it is written: under a compiler, values can't be checked.
        """
        with self.scope(model):
            arguments = {name: self.tensor(value) for name, value in arguments.items()}
            call = self.call if checked else self.quick_call
            return self.results(call(model, training, arguments))

    def quick_call(self, model: Any, training: bool, arguments: Mapping[str, Any]) -> Any:
        """The same as `call`, by whatever way is quickest over many small batches."""
        return self.call(model, training, arguments)

    def call(self, model: Any, training: bool, arguments: Mapping[str, Any]) -> Any:
        """The backend's own call, with the framework's arrays."""
        raise NotImplementedError

    def results(self, output: Any) -> Results:
        """A backend's output record as NumPy."""
        fields = {field.name for field in dataclasses.fields(output)}
        singles = {name: getattr(output, name) for name in SINGLES if name in fields}
        several = {name: getattr(output, name) for name in ("hidden_states", "attentions")}
        return Results(
            **{name: None if value is None else self.array(value) for name, value in singles.items()},
            **{name: None if value is None else tuple(map(self.array, value)) for name, value in several.items()},
            cache=output.past_key_values,
        )

    def gradients(
        self, model: Any, table: tuple[Parameter, ...] | None = None, *, training: bool = False, **arguments: Any
    ) -> dict[str, np.ndarray]:
        """The gradient of the loss with respect to every parameter: canonical name -> canonical layout."""
        table = self.table(model) if table is None else table
        with self.scope(model):
            arguments = {name: self.tensor(value) for name, value in arguments.items()}
            found = self.loss_gradients(model, table, arguments, training=training)
        return {
            parameter.name: found(parameter).T if parameter.transposed(self.scheme) else found(parameter)
            for parameter in table
        }

    def loss_gradients(
        self, model: Any, table: tuple[Parameter, ...], arguments: Mapping[str, Any], *, training: bool
    ) -> Callable[[Parameter], np.ndarray]:
        """The gradients of the loss in the framework's layout, by parameter."""
        raise NotImplementedError

    # Training

    def reseed(self, model: Any, seed: int) -> None:
        """Let dropout draw the same numbers from here on as after the last call with this seed."""
        raise NotImplementedError

    def train(
        self, model: Any, batches: Sequence[Mapping[str, np.ndarray]], settings: Mapping[str, float]
    ) -> list[np.ndarray]:
        """A step of a new AdamW on each batch; see `adamw` and `steps`."""
        return self.steps(model, self.adamw(model, settings), batches)

    def adamw(self, model: Any, settings: Mapping[str, float]) -> Any:
        """An optimizer with `learning_rate`, `beta_1`, `beta_2`, `epsilon` and `weight_decay` of what trains."""
        raise NotImplementedError

    def steps(self, model: Any, optimizer: Any, batches: Sequence[Mapping[str, np.ndarray]]) -> list[np.ndarray]:
        """A step of the optimizer on each batch. Returns the losses; the model is left in evaluation."""
        raise NotImplementedError

    def mixed(self, config: OPTConfig, dtype: str, head: Head | None = None) -> Any:
        """A model with float32 parameters that computes in half precision, inside `autocast`."""
        raise NotImplementedError

    def autocast(self, dtype: str) -> contextlib.AbstractContextManager[Any]:
        """Where a mixed model is called."""
        del dtype
        return contextlib.nullcontext()

    def largest_array(self, model: Any, **arguments: Any) -> int:
        """Number of elements of the largest array that is computed on the way to the gradients of the loss."""
        raise NotImplementedError

    def recomputed_layers(self, model: Any, **arguments: Any) -> int:
        """How many layers the backward pass of a training step computes again."""
        raise NotImplementedError

    def generate(self, model: Any, input_ids: Any, attention_mask: Any = None, **options: Any) -> np.ndarray:
        """Continue prompts."""
        with self.scope(model):
            mask = None if attention_mask is None else self.tensor(np.asarray(attention_mask))
            ids = None if input_ids is None else self.tensor(np.asarray(input_ids))
            return self.array(model.generate(ids, mask, **options))

    def generate_output(self, model: Any, input_ids: Any, attention_mask: Any = None, **options: Any) -> Any:
        """Continue prompts, and get the whole record, in NumPy."""
        with self.scope(model):
            mask = None if attention_mask is None else self.tensor(np.asarray(attention_mask))
            record = model.generate(self.tensor(np.asarray(input_ids)), mask, return_dict_in_generate=True, **options)
            values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
            cache = values.pop("past_key_values")
            return type(record)(
                past_key_values=cache,
                **{
                    name: tuple(map(self.array, value)) if isinstance(value, tuple) else self.optional_array(value)
                    for name, value in values.items()
                },
            )

    def optional_array(self, value: Any) -> np.ndarray | None:
        """An array of the framework's as NumPy; None stays None."""
        return None if value is None else self.array(value)

    def decoder(self, model: Any, prompt: Any) -> Any:
        """The decoder of one run."""
        with self.scope(model):
            return importlib.import_module(f"{self.package.__name__}.generation").Decoder(model, prompt)

    def uncompiled(self) -> contextlib.AbstractContextManager[Any]:
        """Where what would be compiled runs as it is written: slower, but at once."""
        return contextlib.nullcontext()

    def compilations(self) -> int:
        """How many programs generation's steps have been compiled into so far."""
        return 0

    def int8_product(self, inputs: np.ndarray, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """`opt_common.quantization.int8_product`."""
        return self.array(self.rounded_layers().int8_product(*map(self.tensor, (inputs, codes, scales))))

    def int8_gradient(
        self, inputs: np.ndarray, codes: np.ndarray, scales: np.ndarray, upstream: np.ndarray
    ) -> np.ndarray:
        """Gradient of that product's inputs."""
        raise NotImplementedError

    def rounded_layers(self) -> Any:
        """The module with layers in few bits."""
        return importlib.import_module(f"{self.package.__name__}.quantized")

    def process(
        self, found: Any, tokens: np.ndarray, attended: np.ndarray, scores: np.ndarray, gates: np.ndarray
    ) -> np.ndarray:
        """Scores after some of `opt_common.processors.processors`."""
        module = importlib.import_module(f"{self.package.__name__}.processors")
        history = module.History(
            tokens_BS=self.tensor(tokens.astype(self.id_dtype)),
            attended_BS=self.tensor(attended),
            length=tokens.shape[1],
        )
        arguments = [tuple(map(self.tensor, processor.arguments)) for processor in found]
        with self.precision(str(scores.dtype)):
            return self.array(
                module.process(self.tensor(scores), history, program(found), arguments, self.tensor(gates))
            )

    def choose(self, scores: np.ndarray, uniforms: np.ndarray | None) -> np.ndarray:
        """The tokens chosen by processed scores."""
        module = importlib.import_module(f"{self.package.__name__}.processors")
        with self.precision(str(scores.dtype)):
            return self.array(module.choose(self.tensor(scores), self.tensor(uniforms)))

    def retrace(self) -> None:
        """Forget what was compiled: something that it reads has changed."""

    def allocate_cache(self, model: Any, batch_size: int, capacity: int, dtype: str = "float32") -> Any:
        """An empty cache of a fixed capacity."""
        with self.scope(model):
            cache = importlib.import_module(f"{self.package.__name__}.cache").KVCache
            return cache.allocate(model.config, batch_size, capacity, dtype=self.dtype(dtype))

    def cache_arrays(self, cache: Any) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """Keys and values of the tokens a cache holds, (B, S, N, H) by layer."""
        length = int(cache.length)
        keys, values = (tuple(self.array(part)[:, :length] for part in parts) for parts in (cache.keys, cache.values))
        return keys, values

    def scope(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        """The precision of a model's parameters."""
        return self.precision(str(self.parameter(model, self.table(model)[0]).dtype).removeprefix("torch."))

    def dtype(self, name: str) -> Any:
        """The framework's dtype of this name."""
        return name

    def tensor(self, value: Any) -> Any:
        """NumPy to the framework; anything else stays as it is."""
        raise NotImplementedError

    def floats(self, value: Any) -> Any:
        """A framework's array in float32."""
        return value.astype("float32")

    def array(self, value: Any) -> np.ndarray:
        """The framework to NumPy."""
        return widened(np.asarray(value))


SINGLES = ("logits", "start_logits", "end_logits", "loss", "last_hidden_state")
"""Fields of the output records that are one array."""


def widened(array: np.ndarray) -> np.ndarray:
    """Half precision as float32, which holds all its values."""
    return array.astype(np.float32) if array.dtype.itemsize == 2 and array.dtype.kind not in "iu" else array


def counted_calls(adapter: Adapter, model: Any, arguments: Mapping[str, Any]) -> int:
    """How often attention is computed in a training step: once in each layer, and again where it was not kept."""
    modeling = importlib.import_module(f"{adapter.package.__name__}.modeling")
    with mock.patch.object(modeling, "attend", wraps=modeling.attend) as attend:
        adapter.gradients(model, training=True, **arguments)
    return attend.call_count


def walk(tree: Any, path: tuple[str, ...]) -> Any:
    """Follow a parameter's path through attributes, and through lists by number."""
    for part in path:
        tree = tree[int(part)] if part.isdigit() else getattr(tree, part)
    return tree


class TorchAdapter(Adapter):
    """`opt_torch` on the CPU."""

    name, scheme, compiles, id_dtype = "torch", "torch", False, np.int64

    def __init__(self) -> None:
        import torch

        import opt_torch

        self.torch, self.package = torch, opt_torch
        self.lm, self.bare = opt_torch.OPTForCausalLM, opt_torch.OPTModel
        self.heads = {
            "sequence_classification": opt_torch.OPTForSequenceClassification,
            "question_answering": opt_torch.OPTForQuestionAnswering,
        }

    def build(self, config: OPTConfig, *, dtype: str = "float32", bare: bool = False, head: Head | None = None) -> Any:
        self.torch.manual_seed(0)
        return self.model_class(bare, head)(config, dtype=self.dtype(dtype)).eval()

    def uncompiled(self) -> contextlib.AbstractContextManager[Any]:
        return self.torch.no_grad()  # as generation always runs

    def assign(self, variable: Any, value: np.ndarray) -> None:
        with self.torch.no_grad():
            variable.copy_(self.torch.from_numpy(value))

    def count(self, model: Any) -> int:
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    def native_saves(self, model: Any) -> dict[str, Callable[[Path], Any]]:
        state, save = model.state_dict(), self.torch.save
        compiled = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
        return {
            "model.pt": lambda path: save(state, path),
            "epoch-3.pth": lambda path: save(state, path),
            "weights.bin": lambda path: save(dict(state), path, _use_new_zipfile_serialization=False),
            "compiled.pt": lambda path: save(compiled, path),
        }

    def call(self, model: Any, training: bool, arguments: Mapping[str, Any]) -> Any:
        model.train(training)
        try:
            with self.torch.no_grad():
                return model(**arguments)
        finally:
            model.eval()

    def loss_gradients(
        self, model: Any, table: tuple[Parameter, ...], arguments: Mapping[str, Any], *, training: bool
    ) -> Callable[[Parameter], np.ndarray]:
        model.zero_grad()
        model.train(training)
        model(**arguments).loss.backward()
        model.eval()
        found = {parameter.name: self.parameter(model, parameter).grad for parameter in table}
        model.zero_grad()
        return lambda parameter: self.array(found[parameter.name])

    def reseed(self, model: Any, seed: int) -> None:
        self.torch.manual_seed(seed)

    def adamw(self, model: Any, settings: Mapping[str, float]) -> Any:
        return self.torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=settings["learning_rate"],
            betas=(settings["beta_1"], settings["beta_2"]),
            eps=settings["epsilon"],
            weight_decay=settings["weight_decay"],
        )

    def steps(self, model: Any, optimizer: Any, batches: Sequence[Mapping[str, np.ndarray]]) -> list[np.ndarray]:
        model.train()
        losses = []
        for batch in batches:
            loss = model(**{name: self.tensor(value) for name, value in batch.items()}).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(self.array(loss))
        model.eval()
        return losses

    def mixed(self, config: OPTConfig, dtype: str, head: Head | None = None) -> Any:
        return self.build(config, head=head)

    def autocast(self, dtype: str) -> contextlib.AbstractContextManager[Any]:
        return self.torch.autocast("cpu", dtype=self.dtype(dtype))

    def largest_array(self, model: Any, **arguments: Any) -> int:
        from torch.utils._python_dispatch import TorchDispatchMode

        sizes = []

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                tensors = result if isinstance(result, tuple | list) else (result,)
                sizes.extend(tensor.numel() for tensor in tensors if hasattr(tensor, "numel"))
                return result

        with Recorder():
            self.gradients(model, training=True, **arguments)
        return max(sizes)

    def recomputed_layers(self, model: Any, **arguments: Any) -> int:
        return counted_calls(self, model, arguments) - model.config.num_hidden_layers

    def dtype(self, name: str) -> Any:
        return getattr(self.torch, name)

    def tensor(self, value: Any) -> Any:
        return self.torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value

    def floats(self, value: Any) -> Any:
        return value.float()

    def array(self, value: Any) -> np.ndarray:
        value = value.detach()
        return value.float().numpy() if value.dtype == self.torch.bfloat16 else widened(value.numpy())

    def int8_gradient(
        self, inputs: np.ndarray, codes: np.ndarray, scales: np.ndarray, upstream: np.ndarray
    ) -> np.ndarray:
        rows = self.tensor(inputs).requires_grad_()
        product = self.rounded_layers().int8_product(rows, self.tensor(codes), self.tensor(scales))
        product.backward(self.tensor(upstream))
        return self.array(rows.grad)

    def rounded_linear(self, weight: np.ndarray, scheme: str) -> Any:
        """A linear layer in few bits."""
        F, D = weight.shape
        placing: dict[str, Any] = {"use_bias": False, "device": "cpu", "dtype": None}
        module = self.rounded_layers()
        layer = (
            module.Int4Linear(D, F, **placing)
            if scheme == "int4"
            else module.Int8Linear(D, F, dynamic=False, **placing)
        )
        layer.assign_rounded(weight, "cpu", None)
        return layer

    def call_layer(self, layer: Any, inputs: np.ndarray) -> np.ndarray:
        """A layer's outputs."""
        return self.array(layer(self.tensor(inputs)))


class TFAdapter(Adapter):
    """`opt_tf` on the CPU."""

    name, scheme = "tf", "keras"

    def __init__(self) -> None:
        import tensorflow as tf

        import opt_tf

        self.tf, self.package = tf, opt_tf
        self.lm, self.bare = opt_tf.TFOPTForCausalLM, opt_tf.TFOPTModel
        self.heads = {
            "sequence_classification": opt_tf.TFOPTForSequenceClassification,
            "question_answering": opt_tf.TFOPTForQuestionAnswering,
        }

    def build(self, config: OPTConfig, *, dtype: str = "float32", bare: bool = False, head: Head | None = None) -> Any:
        import keras

        keras.utils.set_random_seed(0)
        return self.model_class(bare, head)(config, dtype=dtype)

    def assign(self, variable: Any, value: np.ndarray) -> None:
        variable.assign(value)

    def count(self, model: Any) -> int:
        return sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)

    def native_saves(self, model: Any) -> dict[str, Callable[[Path], Any]]:
        import keras

        def train_state(path: Path) -> None:
            model.compile(optimizer="adam", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
            model.optimizer.build(model.trainable_variables)
            model.save(path)

        def quietly(save: Callable[[Path], Any]) -> Callable[[Path], None]:
            def call(path: Path) -> None:
                with warnings.catch_warnings():
                    # Keras hands NumPy its own variables, in a way that NumPy means to drop.
                    warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
                    save(path)

            return call

        gigabytes = 2e-5
        return {
            "model.weights.h5": quietly(model.save_weights),
            "model.keras": quietly(model.save),
            "sharded.weights.json": quietly(lambda path: model.save_weights(path, max_shard_size=gigabytes)),
            "trained.keras": quietly(train_state),
        }

    @contextlib.contextmanager
    def uncompiled(self) -> Iterator[None]:
        self.tf.config.run_functions_eagerly(True)
        try:
            yield
        finally:
            self.tf.config.run_functions_eagerly(False)

    def compilations(self) -> int:
        module = importlib.import_module("opt_tf.generation")
        gc.collect()  # programs go with their model: a dead one must not go between two counts
        return sum(step.experimental_get_tracing_count() for steps in module._STEPS.values() for step in steps.values())

    def call(self, model: Any, training: bool, arguments: Mapping[str, Any]) -> Any:
        return model(**arguments, training=training)

    def loss_gradients(
        self, model: Any, table: tuple[Parameter, ...], arguments: Mapping[str, Any], *, training: bool
    ) -> Callable[[Parameter], np.ndarray]:
        variables = {parameter.name: self.parameter(model, parameter) for parameter in table}
        with self.tf.GradientTape() as tape:
            loss = model(**arguments, training=training).loss
        gradients = tape.gradient(loss, {name: variable.value for name, variable in variables.items()})
        return lambda parameter: self.array(self.tf.convert_to_tensor(gradients[parameter.name]))

    def reseed(self, model: Any, seed: int) -> None:
        for variable in model.variables:
            if "seed" in variable.path:
                variable.assign([seed, 0])

    def adamw(self, model: Any, settings: Mapping[str, float]) -> Any:
        import keras

        from opt_tf.optimizer import AdamW

        # Keras rounds the learning rate to its own dtype.
        keras.config.set_floatx(model.variable_dtype)
        try:
            optimizer = AdamW(**settings)
            optimizer.build(model.trainable_variables)
            return optimizer
        finally:
            keras.config.set_floatx("float32")

    def mixed(self, config: OPTConfig, dtype: str, head: Head | None = None) -> Any:
        return self.build(config, dtype=f"mixed_{dtype}", head=head)

    def steps(self, model: Any, optimizer: Any, batches: Sequence[Mapping[str, np.ndarray]]) -> list[np.ndarray]:
        losses = []
        for batch in batches:
            with self.tf.GradientTape() as tape:
                loss = model(**{name: self.tensor(value) for name, value in batch.items()}, training=True).loss
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
            losses.append(self.array(loss))
        return losses

    def largest_array(self, model: Any, **arguments: Any) -> int:
        @self.tf.function(autograph=False)
        def step(arguments: Mapping[str, Any]) -> Any:
            with self.tf.GradientTape() as tape:
                loss = model(**arguments, training=True).loss
            return tape.gradient(loss, model.trainable_variables)

        concrete = step.get_concrete_function({name: self.tensor(value) for name, value in arguments.items()})
        graph = concrete.graph.as_graph_def(add_shapes=True)
        nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
        shapes = [shape for node in nodes for shape in node.attr["_output_shapes"].list.shape if not shape.unknown_rank]
        return max(int(np.prod([axis.size for axis in shape.dim], dtype=np.int64)) for shape in shapes)

    def recomputed_layers(self, model: Any, **arguments: Any) -> int:
        return counted_calls(self, model, arguments) - model.config.num_hidden_layers

    def tensor(self, value: Any) -> Any:
        return self.tf.constant(value) if isinstance(value, np.ndarray) else value

    def floats(self, value: Any) -> Any:
        return self.tf.cast(value, "float32")

    def array(self, value: Any) -> np.ndarray:
        return widened(value.numpy())

    def int8_gradient(
        self, inputs: np.ndarray, codes: np.ndarray, scales: np.ndarray, upstream: np.ndarray
    ) -> np.ndarray:
        import tensorflow as tf

        rows = tf.constant(inputs)
        with tf.GradientTape() as tape:
            tape.watch(rows)
            product = self.rounded_layers().int8_product(rows, self.tensor(codes), self.tensor(scales))
        return self.array(tape.gradient(product, rows, output_gradients=self.tensor(upstream)))


class FlaxAdapter(Adapter):
    """`opt_flax` on the CPU. float64 needs JAX's x64 mode, which is switched on around each such call."""

    name, scheme = "flax", "nnx"

    def __init__(self) -> None:
        import jax
        from flax import nnx

        import opt_flax

        self.jax, self.nnx, self.package = jax, nnx, opt_flax
        self.lm, self.bare = opt_flax.FlaxOPTForCausalLM, opt_flax.FlaxOPTModel
        self.heads = {
            "sequence_classification": opt_flax.FlaxOPTForSequenceClassification,
            "question_answering": opt_flax.FlaxOPTForQuestionAnswering,
        }
        self.retrace()

    def retrace(self) -> None:
        flags = ("use_cache", "output_hidden_states", "output_attentions", "output_logits")
        self.compiled_call = self.nnx.jit(lambda model, **arguments: model(**arguments), static_argnames=flags)
        self.compiled_gradient = self.nnx.jit(self.nnx.grad(lambda model, arguments: model(**arguments).loss))
        self.compiled_loss = self.nnx.jit(self.nnx.value_and_grad(lambda model, arguments: model(**arguments).loss))

    def build(self, config: OPTConfig, *, dtype: str = "float32", bare: bool = False, head: Head | None = None) -> Any:
        with self.precision(dtype):
            model = self.model_class(bare, head)(config, dtype=dtype, rngs=self.nnx.Rngs(0))
        model.eval()
        return model

    @contextlib.contextmanager
    def precision(self, dtype: str) -> Iterator[None]:
        with self.jax.enable_x64(dtype == "float64"):
            yield

    def uncompiled(self) -> contextlib.AbstractContextManager[Any]:
        return self.jax.disable_jit()

    def compilations(self) -> int:
        steps = vars(importlib.import_module("opt_flax.generation")).values()
        return sum(step._cache_size() for step in steps if hasattr(step, "_cache_size"))

    def assign(self, variable: Any, value: np.ndarray) -> None:
        with self.precision(str(value.dtype)):
            variable[...] = self.jax.numpy.asarray(value, dtype=variable.dtype)

    def count(self, model: Any) -> int:
        kind = self.nnx.LoRAParam if model.lora_config else self.nnx.Param
        return sum(leaf.size for leaf in self.jax.tree.leaves(self.nnx.state(model, kind)))

    def native_saves(self, model: Any) -> dict[str, Callable[[Path], Any]]:
        from orbax import checkpoint

        state = self.nnx.state(model)
        arrays = self.nnx.to_pure_dict(self.nnx.state(model, self.nnx.Param))

        def standard(tree: Any) -> Callable[[Path], None]:
            def save(path: Path) -> None:
                with checkpoint.StandardCheckpointer() as saver:
                    saver.save(path, tree)

            return save

        def manager(path: Path) -> None:
            with checkpoint.CheckpointManager(path.parent) as saver:
                saver.save(int(path.name), args=checkpoint.args.StandardSave(state))

        apart = checkpoint.PyTreeCheckpointer(use_ocdbt=False)
        return {
            "state": standard(state),
            "arrays": standard(arrays),
            "apart": lambda path: apart.save(path, arrays),
            "steps/3": manager,
        }

    def call(self, model: Any, training: bool, arguments: Mapping[str, Any]) -> Any:
        (model.train if training else model.eval)()
        try:
            return model(**arguments)
        finally:
            model.eval()

    def quick_call(self, model: Any, training: bool, arguments: Mapping[str, Any]) -> Any:
        # One compilation takes a fifth of the time of compiling each operation of a new shape by itself. A cache
        # makes room for new tokens outside of compiled functions only.
        if "past_key_values" in arguments:
            return self.call(model, training, arguments)
        (model.train if training else model.eval)()
        try:
            return self.compiled_call(model, **arguments)
        finally:
            model.eval()

    def loss_gradients(
        self, model: Any, table: tuple[Parameter, ...], arguments: Mapping[str, Any], *, training: bool
    ) -> Callable[[Parameter], np.ndarray]:
        (model.train if training else model.eval)()
        gradients = self.compiled_gradient(model, dict(arguments))
        model.eval()

        def find(parameter: Parameter) -> np.ndarray:
            found = gradients
            for part in parameter.path(self.scheme):
                if "base_layer" in found and part not in found:
                    found = found["base_layer"]
                found = found[int(part) if part.isdigit() else part]
            return self.array(found)

        return find

    def reseed(self, model: Any, seed: int) -> None:
        self.nnx.reseed(model, dropout=seed, default=seed)

    def adamw(self, model: Any, settings: Mapping[str, float]) -> Any:
        import optax

        names = {"learning_rate": "learning_rate", "beta_1": "b1", "beta_2": "b2", "epsilon": "eps"}
        chain = optax.adamw(**{names.get(name, name): value for name, value in settings.items()})
        with self.scope(model):
            return self.nnx.Optimizer(model, chain, wrt=self.nnx.LoRAParam if model.lora_config else self.nnx.Param)

    def steps(self, model: Any, optimizer: Any, batches: Sequence[Mapping[str, np.ndarray]]) -> list[np.ndarray]:
        losses = []
        with self.scope(model):
            model.train()
            for batch in batches:
                arguments = {name: self.tensor(value) for name, value in batch.items()}
                loss, gradients = self.compiled_loss(model, arguments)
                if model.lora_config:
                    gradients = self.nnx.filter_state(gradients, self.nnx.LoRAParam)
                optimizer.update(model, gradients)
                losses.append(self.array(loss))
            model.eval()
        return losses

    def traced_step(self, model: Any, arguments: Mapping[str, Any]) -> list[Any]:
        """The equations of a training step's gradients, those of inner programs too."""
        from jax.extend.core import jaxprs_in_params

        model.train()
        graph, parameters, rest = self.nnx.split(model, self.nnx.Param, ...)
        arguments = {name: self.tensor(value) for name, value in arguments.items()}
        found: list[Any] = []

        def visit(program: Any) -> None:
            for equation in program.eqns:
                found.append(equation)
                for inner in jaxprs_in_params(equation.params):
                    visit(inner)

        def loss(parameters: Any, rest: Any) -> Any:
            return self.nnx.merge(graph, parameters, rest, copy=True)(**arguments).loss

        visit(self.jax.make_jaxpr(self.jax.grad(loss))(parameters, rest).jaxpr)
        model.eval()
        return found

    def mixed(self, config: OPTConfig, dtype: str, head: Head | None = None) -> Any:
        model_class = self.model_class(False, head)
        return model_class(config, dtype=dtype, param_dtype="float32", rngs=self.nnx.Rngs(0))

    def largest_array(self, model: Any, **arguments: Any) -> int:
        equations = self.traced_step(model, arguments)
        return max(int(np.prod(result.aval.shape)) for equation in equations for result in equation.outvars)

    def recomputed_layers(self, model: Any, **arguments: Any) -> int:
        names = [equation.primitive.name for equation in self.traced_step(model, arguments)]
        return sum(name in ("checkpoint", "remat", "remat2") for name in names)

    def tensor(self, value: Any) -> Any:
        return self.jax.numpy.asarray(value) if isinstance(value, np.ndarray) else value

    def array(self, value: Any) -> np.ndarray:
        return widened(np.asarray(value[...] if isinstance(value, self.nnx.Variable) else value))

    def int8_gradient(
        self, inputs: np.ndarray, codes: np.ndarray, scales: np.ndarray, upstream: np.ndarray
    ) -> np.ndarray:
        import jax

        arrays = self.tensor(codes), self.tensor(scales)
        _, pull = jax.vjp(lambda rows: self.rounded_layers().int8_product(rows, *arrays), self.tensor(inputs))
        return self.array(pull(self.tensor(upstream))[0])


ADAPTERS = {"torch": TorchAdapter, "tf": TFAdapter, "flax": FlaxAdapter}
