"""JAX's own ways of training: nnx.Optimizer with optax in a compiled step, the functional form, Orbax checkpoints."""

import numpy as np
import pytest

from opt_common.config import OPTConfig
from tests.adapters import BACKENDS

if "flax" not in BACKENDS:
    pytest.skip("the JAX backend is not under test", allow_module_level=True)

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx

from opt_flax import FlaxOPTForCausalLM

CONFIG = OPTConfig(
    vocab_size=40,
    hidden_size=8,
    num_hidden_layers=2,
    ffn_dim=12,
    max_position_embeddings=16,
    num_attention_heads=2,
    attention_dropout=0.1,
)
IDS = jnp.arange(4)[:, None] + jnp.arange(7)[None] + 4


def new(seed=0):
    model = FlaxOPTForCausalLM(CONFIG, rngs=nnx.Rngs(seed))
    model.gradient_checkpointing_enable()
    return model, nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)


@nnx.jit
def step(model, optimizer):
    loss, gradients = nnx.value_and_grad(lambda model: model(input_ids=IDS, labels=IDS).loss)(model)
    optimizer.update(model, gradients)
    return loss


def test_training_goes_on_from_an_orbax_checkpoint(tmp_path):
    """With dropout: the state of the random numbers is part of the checkpoint, as the moments of AdamW are."""
    model, optimizer = new()
    losses = [float(step(model, optimizer)) for _ in range(6)]
    again, again_optimizer = new()
    assert [float(step(again, again_optimizer)) for _ in range(3)] == losses[:3]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.to_pure_dict(nnx.state((again, again_optimizer))))
    resumed, resumed_optimizer = new(seed=1)
    state = nnx.state((resumed, resumed_optimizer))
    with ocp.StandardCheckpointer() as checkpointer:
        nnx.replace_by_pure_dict(state, checkpointer.restore(tmp_path / "state", nnx.to_pure_dict(state)))
    nnx.update((resumed, resumed_optimizer), state)
    np.testing.assert_allclose([float(step(resumed, resumed_optimizer)) for _ in range(3)], losses[3:], rtol=1e-6)
    assert losses[-1] < losses[0]


def test_parameters_as_a_pytree():
    """Without nnx.Optimizer; `copy=True`, because the merged model draws random numbers inside a transformation."""
    model, _ = new()
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def gradients(parameters, rest):
        def loss(parameters):
            return nnx.merge(graph, parameters, rest, copy=True)(input_ids=IDS, labels=IDS).loss

        return jax.value_and_grad(loss)(parameters)

    first, found = gradients(parameters, rest)
    parameters = jax.tree.map(lambda value, slope: value - 0.5 * slope, parameters, found)
    assert float(gradients(parameters, rest)[0]) < float(first)
