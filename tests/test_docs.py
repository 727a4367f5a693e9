"""The documentation says what is true: its examples run, its links lead somewhere, its lists are complete."""

import re
from pathlib import Path

import pytest

from opt_common.inputs import DROPPED_ARGUMENTS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def _examples(page: Path) -> str:
    """Every Python block of a page, as one program: a reader goes from one to the next."""
    lines: list[str] = []
    text = page.read_text(encoding="utf-8")
    for block in _BLOCK.finditer(text):
        # Blank lines in front, so that a traceback gives the line in the page.
        lines += [""] * (text.count("\n", 0, block.start(1)) - len(lines))
        lines += block.group(1).splitlines()
    return "\n".join(lines)


@pytest.mark.parametrize("page", [page for page in PAGES if _examples(page)], ids=lambda page: page.name)
def test_examples_run(page: Path) -> None:
    exec(compile(_examples(page), str(page), "exec"), {"__name__": "example"})


def test_there_are_examples() -> None:
    assert sum(bool(_examples(page)) for page in PAGES) >= 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    broken = [link for link in _LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]
    assert not broken


def test_every_dropped_argument_is_documented() -> None:
    rows = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    missing = [name for name in DROPPED_ARGUMENTS if not re.search(rf"^\|[^|]*`{name}=`", rows, re.MULTILINE)]
    assert not missing
