"""OPT in PyTorch: the same model, names and numbers as `opt_tf` and `opt_flax`."""

from opt_common.errors import MissingFrameworkError

try:
    import torch as _torch  # noqa: F401
except ImportError:
    raise MissingFrameworkError(
        "opt_torch needs PyTorch, which is not installed: pip install 'opt-models[torch]'."
    ) from None

from opt_common.config import OPTConfig
from opt_torch.cache import KVCache
from opt_torch.modeling import OPTForCausalLM, OPTModel

__all__ = ["KVCache", "OPTConfig", "OPTForCausalLM", "OPTModel"]
