"""The distribution holds together: its programs exist, its data ships, its pins lie inside its ranges."""

import importlib
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = ("opt_common", "conversion", "opt_torch", "opt_tf", "opt_flax")


def _requirements() -> list[Requirement]:
    """What the project and its extras need, its own extras left out."""
    project = PROJECT["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return [requirement for requirement in map(Requirement, lines) if requirement.name != project["name"]]


def _pins() -> dict[str, str]:
    """constraints.txt: name -> version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pins}


@pytest.mark.parametrize("program", sorted(PROJECT["project"]["scripts"]))
def test_program_exists(program: str) -> None:
    module, _, function = PROJECT["project"]["scripts"][program].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("requirement", _requirements(), ids=str)
def test_pin_lies_in_range(requirement: Requirement) -> None:
    # `tensorflow` and `tensorflow-cpu` are one module: CI proves the small one.
    name = "tensorflow-cpu" if requirement.name == "tensorflow" else requirement.name
    assert requirement.specifier.contains(_pins()[canonicalize_name(name)])


def test_no_framework_among_the_base_requirements() -> None:
    names = {canonicalize_name(Requirement(line).name) for line in PROJECT["project"]["dependencies"]}
    assert names.isdisjoint({"torch", "tensorflow", "tensorflow-cpu", "keras", "jax", "jaxlib", "flax", "transformers"})


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"][package]


def test_bundled_model_ships() -> None:
    names = {path.name for path in (ROOT / "opt_common" / "opt_tiny").iterdir()}
    assert {"config.json", "model.safetensors"} <= names
    assert "opt_tiny/*" in PROJECT["tool"]["setuptools"]["package-data"]["opt_common"]
