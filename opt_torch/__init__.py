"""OPT in PyTorch: the same model, names and numbers as `opt_tf` and `opt_flax`."""

from typing import TYPE_CHECKING

from opt_common.config import OPTConfig
from opt_common.frameworks import lazy_exports

if TYPE_CHECKING:
    from opt_torch.cache import KVCache
    from opt_torch.heads import OPTForQuestionAnswering, OPTForSequenceClassification
    from opt_torch.modeling import OPTForCausalLM, OPTModel
    from opt_torch.optimizer import load_optimizer, save_optimizer

__all__ = [
    "KVCache",
    "OPTConfig",
    "OPTForCausalLM",
    "OPTForQuestionAnswering",
    "OPTForSequenceClassification",
    "OPTModel",
    "load_optimizer",
    "save_optimizer",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "KVCache": "cache",
        "OPTForCausalLM": "modeling",
        "OPTForQuestionAnswering": "heads",
        "OPTForSequenceClassification": "heads",
        "OPTModel": "modeling",
        "load_optimizer": "optimizer",
        "save_optimizer": "optimizer",
    },
    framework="PyTorch",
    modules=("torch",),
    extra="torch",
)
