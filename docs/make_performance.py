"""Write the tables of `docs/performance.md` from `benchmarks/results/`; with --check, exit with 1 if they are old.

A table stands between `<!-- results: NAME -->` and `<!-- end -->`; NAME.json is what `benchmarks.speed --json` wrote.
After `<!-- scaling: NAME NAME -->` it is made of what `benchmarks.scaling --json` wrote.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))

from benchmarks import scaling, speed  # noqa: E402  (the repository's root is no package)


def rendered(page: str) -> str:
    """The page with its tables made anew."""

    def block(found: re.Match[str]) -> str:
        results = [json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in found[2].split()]
        table = scaling.table(results) if found[1] == "scaling" else speed.table(*results)
        return f"<!-- {found[1]}: {found[2]} -->\n\n{table}\n\n<!-- end -->"

    return re.sub(r"<!-- (results|scaling): ([\w. -]+) -->.*?<!-- end -->", block, page, flags=re.DOTALL)


def main() -> int:
    """Write the page, or hold it against what would be written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    old = PAGE.read_text(encoding="utf-8")
    new = rendered(old)
    if check and new != old:
        print(f"{PAGE} is not current. Run `make format`.", file=sys.stderr)
        return 1
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
