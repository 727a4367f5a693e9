"""The errors this package raises for a user's mistake.

Each message says what was got, what was expected and what to do. Every class is also a `ValueError` (or, for a
framework that is not installed, an `ImportError`), so that code which knows nothing of this package can catch it.
"""

from collections.abc import Sequence


class OPTError(Exception):
    """Base class of every error raised on purpose by this package."""


class ConfigError(OPTError, ValueError):
    """A model configuration that no OPT model can have."""


class CheckpointError(OPTError, ValueError):
    """A checkpoint that is absent, damaged, hostile or does not fit its configuration."""


class TokenizerError(OPTError, ValueError):
    """Tokenizer files or text that cannot be used."""


class InputError(OPTError, ValueError):
    """Arguments of a model call that the model cannot compute with."""


class GenerationError(OPTError, ValueError):
    """Generation settings that contradict each other or the model."""


class MissingFrameworkError(OPTError, ImportError):
    """A framework (or one of its options) that is asked for but not installed."""


def join_problems(problems: Sequence[str]) -> str:
    """One message out of all the problems found, so that a user can mend them in one go."""
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems)
