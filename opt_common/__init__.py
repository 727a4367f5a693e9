"""What the OPT models have in common, whatever the framework: configuration, parameters, tokenizer, decoding rules."""

from opt_common.config import OPTConfig
from opt_common.constraints import DisjunctiveConstraint, PhrasalConstraint
from opt_common.errors import (
    CheckpointError,
    ConfigError,
    GenerationError,
    InputError,
    MissingFrameworkError,
    OPTError,
    TokenizerError,
)
from opt_common.generation import GenerationConfig
from opt_common.lora import LoraConfig
from opt_common.streaming import TextIteratorStreamer, TextStreamer
from opt_common.tokenizer import OPTTokenizer
from opt_common.watermark import WatermarkDetector, WatermarkingConfig

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DisjunctiveConstraint",
    "GenerationConfig",
    "GenerationError",
    "InputError",
    "LoraConfig",
    "MissingFrameworkError",
    "OPTConfig",
    "OPTError",
    "OPTTokenizer",
    "PhrasalConstraint",
    "TextIteratorStreamer",
    "TextStreamer",
    "TokenizerError",
    "WatermarkDetector",
    "WatermarkingConfig",
]
