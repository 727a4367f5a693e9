"""The documentation says what is true: its examples run, its links lead somewhere, its lists are complete."""

import re
from pathlib import Path

import pytest

from opt_common.inputs import DROPPED_ARGUMENTS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def _examples() -> list[object]:
    """Every Python block of every page, as the parameters of a test."""
    examples: list[object] = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in _BLOCK.finditer(text):
            line = text.count("\n", 0, block.start(1))
            # Blank lines in front, so that a traceback gives the line in the page.
            examples.append(pytest.param(page, "\n" * line + block.group(1), id=f"{page.name}:{line + 1}"))
    return examples


@pytest.mark.parametrize(("page", "code"), _examples())
def test_example_runs(page: Path, code: str) -> None:
    exec(compile(code, str(page), "exec"), {"__name__": "example"})


def test_there_are_examples() -> None:
    assert len(_examples()) >= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    broken = [link for link in _LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]
    assert not broken


def test_every_dropped_argument_is_documented() -> None:
    rows = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    missing = [name for name in DROPPED_ARGUMENTS if not re.search(rf"^\|[^|]*`{name}=`", rows, re.MULTILINE)]
    assert not missing
