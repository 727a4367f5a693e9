"""Read, write, convert and verify OPT checkpoints of every published format, without any framework."""

from conversion.checkpoint import Checkpoint, checked_parameters, open_checkpoint
from conversion.convert import convert, merge_adapter, plan_conversion
from conversion.save import save_checkpoint
from conversion.verify import verify

__all__ = [
    "Checkpoint",
    "checked_parameters",
    "convert",
    "merge_adapter",
    "open_checkpoint",
    "plan_conversion",
    "save_checkpoint",
    "verify",
]
