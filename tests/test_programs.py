"""The installed programs, from their first line on."""

import subprocess
import sys
import textwrap

import pytest

import opt_programs
from tests.paths import ROOT
from tests.test_package import PROJECT

SCRIPTS = PROJECT["project"]["scripts"]

INTERRUPTED = """
    import os, signal, sys

    # A shell starts what runs behind its back with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    class Presses:
        def find_spec(self, name, *_):
            if name == "numpy":
                os.kill(os.getpid(), signal.SIGINT)

    sys.meta_path.insert(0, Presses())
    from {module} import {function}
    sys.exit({function}())
"""
"""What pip writes for a program, on a keyboard whose user presses Ctrl-C while NumPy is imported."""


def run(program):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False, cwd=ROOT
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_ctrl_c_while_a_program_is_imported(name):
    module, _, function = SCRIPTS[name].partition(":")
    done = run(INTERRUPTED.format(module=module, function=function))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{name}: interrupted.\n")


def test_nothing_is_imported_before_ctrl_c_is_answered():
    """Beside the standard library's importlib, which Python has loaded by then."""
    program = "import importlib, sys; before = set(sys.modules); import opt_programs; print(set(sys.modules) - before)"
    assert run(program).stdout == "{'opt_programs'}\n"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_program_takes_its_arguments(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        getattr(opt_programs, SCRIPTS[name].partition(":")[2])()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {name} ")


def test_a_program_gives_its_exit_code(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["opt-convert", "inspect", "/no/such"])
    assert opt_programs.opt_convert() == 1
