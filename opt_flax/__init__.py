"""OPT in JAX and Flax NNX: the same model, names and numbers as `opt_torch` and `opt_tf`."""

from typing import TYPE_CHECKING

from opt_common.config import OPTConfig
from opt_common.frameworks import lazy_exports

if TYPE_CHECKING:
    from opt_flax.cache import KVCache
    from opt_flax.heads import FlaxOPTForQuestionAnswering, FlaxOPTForSequenceClassification
    from opt_flax.modeling import FlaxOPTForCausalLM, FlaxOPTModel
    from opt_flax.optimizer import load_optimizer, save_optimizer

__all__ = [
    "FlaxOPTForCausalLM",
    "FlaxOPTForQuestionAnswering",
    "FlaxOPTForSequenceClassification",
    "FlaxOPTModel",
    "KVCache",
    "OPTConfig",
    "load_optimizer",
    "save_optimizer",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "KVCache": "cache",
        "FlaxOPTForCausalLM": "modeling",
        "FlaxOPTForQuestionAnswering": "heads",
        "FlaxOPTForSequenceClassification": "heads",
        "FlaxOPTModel": "modeling",
        "load_optimizer": "optimizer",
        "save_optimizer": "optimizer",
    },
    framework="JAX and Flax",
    modules=("jax", "flax"),
    extra="flax",
)
