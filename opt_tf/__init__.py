"""OPT in TensorFlow, as Keras 3 models: the same model, names and numbers as `opt_torch` and `opt_flax`."""

from typing import TYPE_CHECKING

from opt_common.config import OPTConfig
from opt_common.frameworks import lazy_exports

if TYPE_CHECKING:
    from opt_tf.cache import KVCache
    from opt_tf.heads import TFOPTForQuestionAnswering, TFOPTForSequenceClassification
    from opt_tf.modeling import TFOPTForCausalLM, TFOPTModel
    from opt_tf.optimizer import load_optimizer, save_optimizer

__all__ = [
    "KVCache",
    "OPTConfig",
    "TFOPTForCausalLM",
    "TFOPTForQuestionAnswering",
    "TFOPTForSequenceClassification",
    "TFOPTModel",
    "load_optimizer",
    "save_optimizer",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "KVCache": "cache",
        "TFOPTForCausalLM": "modeling",
        "TFOPTForQuestionAnswering": "heads",
        "TFOPTForSequenceClassification": "heads",
        "TFOPTModel": "modeling",
        "load_optimizer": "optimizer",
        "save_optimizer": "optimizer",
    },
    framework="TensorFlow and Keras 3",
    modules=("tensorflow", "keras"),
    extra="tf",
)
