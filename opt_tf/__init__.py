"""OPT in TensorFlow, as Keras 3 models: the same model, names and numbers as `opt_torch` and `opt_flax`."""

from opt_common.errors import MissingFrameworkError

try:
    import keras as _keras
    import tensorflow as _tf  # noqa: F401
except ImportError:
    raise MissingFrameworkError(
        "opt_tf needs TensorFlow and Keras 3, which are not installed: pip install 'opt-models[tf]'."
    ) from None

if _keras.version().startswith("2."):
    raise MissingFrameworkError(f"opt_tf needs Keras 3, got Keras {_keras.version()}: pip install 'keras>=3.5'.")
if _keras.backend.backend() != "tensorflow":
    raise MissingFrameworkError(
        f"opt_tf needs Keras on TensorFlow, but Keras runs on {_keras.backend.backend()}. "
        "Set the environment variable KERAS_BACKEND=tensorflow before Python starts, or use opt_flax or opt_torch."
    )

from opt_common.config import OPTConfig
from opt_tf.cache import KVCache
from opt_tf.modeling import TFOPTForCausalLM, TFOPTModel

__all__ = ["KVCache", "OPTConfig", "TFOPTForCausalLM", "TFOPTModel"]
