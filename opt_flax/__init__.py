"""OPT in JAX and Flax NNX: the same model, names and numbers as `opt_torch` and `opt_tf`."""

from opt_common.errors import MissingFrameworkError

try:
    import flax.nnx as _nnx  # noqa: F401
except ImportError:
    raise MissingFrameworkError(
        "opt_flax needs JAX and Flax, which are not installed: pip install 'opt-models[flax]'."
    ) from None

from opt_common.config import OPTConfig
from opt_flax.cache import KVCache
from opt_flax.modeling import FlaxOPTForCausalLM, FlaxOPTModel

__all__ = ["FlaxOPTForCausalLM", "FlaxOPTModel", "KVCache", "OPTConfig"]
