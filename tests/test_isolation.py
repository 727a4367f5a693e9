"""Each package works without the other frameworks, and importing it costs and changes next to nothing."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from tests.adapters import BACKENDS
from tests.paths import GOLDENS, ROOT

FRAMEWORKS = {"torch": ("torch",), "tf": ("tensorflow", "keras"), "flax": ("jax", "jaxlib", "flax")}
NEVER = ("transformers", "tf_keras", "safetensors")
"""Modules that no package of ours may need."""

SECONDS = 0.3
CLASSES = {"torch": "OPTForCausalLM", "tf": "TFOPTForCausalLM", "flax": "FlaxOPTForCausalLM"}
"""What a user imports from a backend; a package alone is imported without its framework."""

FORMATS = ("safetensors", "torch_bin", "tf_h5", "flax_msgpack")


def run(program, *arguments):
    """Run a program in a fresh interpreter and read the JSON it prints last."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        # Python keeps its bytecode, as it does for a user; where it may not, every import compiles anew.
        env={name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


BLOCK = """
    import json, sys, time
    for name in json.loads(sys.argv[1]):
        sys.modules[name] = None
"""


def blocked_for(package):
    """Every framework that a package must do without."""
    others = [name for key, names in FRAMEWORKS.items() if key != package for name in names]
    return json.dumps([*others, *NEVER])


@pytest.mark.parametrize("package", ["opt_common", "conversion"])
def test_framework_free_packages_import_without_any(package):
    loaded = run(
        BLOCK
        + f"\n    import {package}, {package}.cli\n    print(json.dumps([n for n in sys.modules if sys.modules[n]]))",
        blocked_for(None),
    )
    assert package in loaded


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_loads_every_format_with_its_own_framework_only(name):
    program = (
        BLOCK
        + f"""
    from opt_{name} import {CLASSES[name]} as model_class
    for format in {FORMATS!r}:
        model_class.from_pretrained(f"{GOLDENS}/pre_ln/{{format}}", dtype="float32")
    print(json.dumps(sorted(n for n in sys.modules if sys.modules[n])))
    """
    )
    loaded = set(run(program, blocked_for(name)))
    assert set(FRAMEWORKS[name]) <= loaded
    assert not [module for key, names in FRAMEWORKS.items() if key != name for module in names if module in loaded]


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_never_import_each_other(name):
    loaded = run(f"import json, sys\nfrom opt_{name} import {CLASSES[name]}\nprint(json.dumps(list(sys.modules)))")
    assert not [
        module
        for module in loaded
        if module.split(".")[0] in {f"opt_{other}" for other in FRAMEWORKS} - {f"opt_{name}"}
    ]


def best_of(count, program):
    """The least of several timings, in seconds of the processor: what else the machine does is not counted."""
    return min(run(program) for _ in range(count))


def test_import_time_of_opt_common():
    program = """
        import time, sys, json
        start = time.process_time()
        import opt_common
        seconds = time.process_time() - start
        frameworks = {"torch", "tensorflow", "keras", "jax", "flax", "transformers"} & set(sys.modules)
        assert not frameworks, frameworks
        print(json.dumps(seconds))
    """
    assert best_of(5, program) < SECONDS


# What a script would import next to the package: the share of the package alone is what is left.
BESIDE = {"torch": "import torch", "tf": "import tensorflow, keras", "flax": "import jax; from flax import nnx"}


@pytest.mark.parametrize("name", BACKENDS)
def test_import_time_that_a_backend_adds_to_its_framework(name):
    # The framework's objects are gone through once before: a collection of garbage in between would count as ours.
    program = f"""
        import gc, time, json
        {BESIDE[name]}
        gc.collect()
        start = time.process_time()
        from opt_{name} import {CLASSES[name]}
        print(json.dumps(time.process_time() - start))
    """
    assert best_of(3, program) < SECONDS


@pytest.mark.parametrize("name", BACKENDS)
def test_importing_changes_nothing(name):
    """No logging set-up, no prints, no global flags: what other users of the process rely on stays as it is."""
    flags = {
        "torch": "import torch; state = lambda: [torch.get_default_dtype(), torch.get_num_threads(), "
        "torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()]",
        "tf": "import tensorflow, keras; state = lambda: [keras.config.floatx(), keras.config.dtype_policy().name, "
        "tensorflow.config.functions_run_eagerly(), keras.config.backend()]",
        "flax": "import jax; from flax import nnx; state = lambda: sorted(jax.config.values.items(), key=str)",
    }[name]
    program = f"""
        import io, json, logging, contextlib, os
        {flags}
        whole = lambda: repr([state(), logging.root.handlers, logging.root.level, dict(os.environ)])
        before, out = whole(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            from opt_{name} import {CLASSES[name]}
        print(json.dumps([before == whole(), out.getvalue()]))
    """
    same, printed = run(program)
    assert same
    assert printed == ""
