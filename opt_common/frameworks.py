"""How a backend package puts off importing its framework until something of it is used.

So `opt-torch --help` answers at once, and where the framework is missing the answer is one sentence.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from opt_common.errors import MissingFrameworkError


def lazy_exports(
    package: str, exports: Mapping[str, str], *, framework: str, modules: tuple[str, ...], extra: str
) -> Callable[[str], Any]:
    """A module-level `__getattr__` that imports what a package exports when it is asked for.

    Args:
        package: the package's name.
        exports: exported name -> the package's module that defines it.
        framework: what to call the framework in a message.
        modules: top-level modules that the framework consists of.
        extra: the extra of this distribution that installs it.

    Returns:
        The function. It raises `MissingFrameworkError` if the framework is not installed.
    """

    def load(name: str) -> Any:
        if name not in exports:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        for module in modules:
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                if (error.name or "").partition(".")[0] not in modules:
                    raise
                raise MissingFrameworkError(
                    f"{package} needs {framework}; no module {module} is installed: pip install 'opt-models[{extra}]'."
                ) from None
        return getattr(importlib.import_module(f"{package}.{exports[name]}"), name)

    return load
