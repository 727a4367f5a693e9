"""What `opt-convert verify` prints for people."""

import textwrap
from collections.abc import Callable, Sequence

from conversion.function import REFERENCE, FunctionCheck
from conversion.verify import Verification

SHOWN_PROBLEMS = 10
"""Problems that are printed; `--json` has them all."""

_VERDICTS = (
    ("equal", "the same bits"),
    ("rounded", "the same after rounding to the narrower dtype"),
    ("differs", "different"),
)
_LABEL, _COLUMN = 26, 12


def show_verification(result: Verification) -> None:
    """Print a verification: tensors, a table of what is computed, problems, verdict."""
    if result.against is None:
        print(f"{result.source}: {result.tensors} tensors")
    else:
        print(f"{result.source} against {result.against}: {result.tensors} tensors")
        for verdict, meaning in _VERDICTS:
            if count := sum(check.verdict == verdict for check in result.checks):
                print(f"  {count:6} {meaning}")
    first = () if result.function is None else (result.function,)
    sources = dict.fromkeys(check.checkpoint for check in result.frameworks)
    if first:
        print(f"\n  {result.source} against {result.against}, both in the NumPy reference")
        _show_table(first)
    for source in sources:
        print(f"\n  {source} in each framework, against the same in the NumPy reference")
        _show_table([check for check in result.frameworks if check.checkpoint == source])
    for problem in result.problems[:SHOWN_PROBLEMS]:
        print(f"  problem: {problem}")
    if (more := len(result.problems) - SHOWN_PROBLEMS) > 0:
        print(f"  and {more} more problems; --json lists all")
    print("holds" if result.holds else "DOES NOT HOLD")


def _show_table(checks: Sequence[FunctionCheck]) -> None:
    """One column a check: the largest difference of each part of the model, then of what comes of it."""

    def row(label: str, cell: Callable[[FunctionCheck], str]) -> None:
        print((f"    {label:{_LABEL}}" + "".join(f"{cell(check):>{_COLUMN}}" for check in checks)).rstrip())

    row("max |difference|, float64", lambda check: check.framework)
    count = len(checks[0].hidden_states)
    for index in range(count):
        row(_part(index, count), lambda check, index=index: _marked(check, index))
    row("logits", lambda check: f"{check.logits:.2e} ")
    row("highest logit agrees at", lambda check: f"{check.top1_agreement:.1%} ")
    if checks[0].greedy:
        row("greedy continuation", lambda check: "equal " if check.greedy_equal else "DIFFERENT ")
    for check in checks:
        if check.first_layer is not None:
            where = "" if check.framework == REFERENCE else f" in {check.framework}"
            print(f"    first difference{where}: {check.first_layer}")
    for text in checks[0].text:
        print("    greedy text: " + textwrap.shorten(repr(text), 100))


def _part(index: int, count: int) -> str:
    if index == 0:
        return "embeddings"
    return "last hidden state" if index == count - 1 else f"layer {index - 1}"


def _marked(check: FunctionCheck, index: int) -> str:
    """A difference, with a mark where it is the first."""
    return f"{check.hidden_states[index]:.2e}" + ("<" if index == check.first_divergent else " ")
