"""Run in an environment that holds one framework, or none: does what should work there work?

In every environment `opt-convert` converts between all four formats, and tensors stay bit-equal. With a framework,
`from_pretrained` loads each of the four formats and gives the golden logits, the same bits from each. The backends
whose framework is absent say in one sentence what to install.

Usage: python -m tests.isolated.check {none,torch,tf,flax}
"""

import importlib
import importlib.util
import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from conversion import open_checkpoint
from opt_common.errors import MissingFrameworkError
from tests.adapters import ADAPTERS
from tests.paths import GOLDENS
from tests.tolerances import FLOAT32, compare

MODEL = GOLDENS / "pre_ln"
FORMATS = {"safetensors": "safetensors", "torch": "torch_bin", "tf": "tf_h5", "flax": "flax_msgpack"}
MODULES = {"torch": "torch", "tf": "tensorflow", "flax": "flax"}


def check_environment(framework: str) -> None:
    """The environment holds the framework that was asked for and no other."""
    found = {name for name, module in MODULES.items() if importlib.util.find_spec(module)}
    expected = {framework} - {"none"}
    assert found == expected, f"this environment holds {sorted(found)}, expected {sorted(expected)}"


def check_conversions() -> None:
    """`opt-convert` converts every format to every other one, and every tensor keeps its bits."""
    program = Path(sys.executable).with_name("opt-convert")
    for source, target in itertools.permutations(FORMATS, 2):
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch) / target
            command = [program, "convert", MODEL / FORMATS[source], directory, "--to", target]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            with open_checkpoint(MODEL / FORMATS[source]) as old, open_checkpoint(directory) as new:
                assert new.format == target, f"{source} -> {target}: wrote {new.format}"
                assert set(old.names) == set(new.names), f"{source} -> {target}: other names"
                for name in old.names:
                    assert old.read(name).tobytes() == new.read(name).tobytes(), f"{source} -> {target}: {name}"
        print(f"convert {source:11} -> {target:11} every tensor bit-equal")


def check_backend(framework: str) -> None:
    """The backend loads all four formats, to the same logits, and these are the golden ones."""
    adapter = ADAPTERS[framework]()
    with np.load(MODEL / "expected.npz") as expected:
        input_ids, golden = expected["nopad/input_ids"], expected["nopad/logits"]
    first = None
    for name, folder in FORMATS.items():
        logits = adapter.forward(adapter.load(MODEL / folder), input_ids=input_ids).logits
        difference = compare(logits, golden, FLOAT32, what=f"logits from {name}")
        first = logits if first is None else first
        assert np.array_equal(logits, first), f"logits from {name} are not those from {next(iter(FORMATS))}"
        print(f"opt_{framework:5} from {name:11} max |logits - golden| = {difference:.1e}")


def check_missing(framework: str) -> None:
    """A backend whose framework is not installed says so, and what to do."""
    for name in sorted(MODULES.keys() - {framework}):
        try:
            _ = importlib.import_module(f"opt_{name}").KVCache
        except MissingFrameworkError as error:
            message = str(error)
        else:
            raise AssertionError(f"opt_{name} was used without its framework")
        assert f"opt-models[{name}]" in message, f"opt_{name}: {message}"
        print(f"opt_{name}: {message}")


def main() -> None:
    """Check the environment this runs in."""
    framework = sys.argv[1]
    check_environment(framework)
    check_conversions()
    check_missing(framework)
    if framework != "none":
        check_backend(framework)


if __name__ == "__main__":
    main()
