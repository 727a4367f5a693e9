"""Links in a checkpoint's directory: which of them are followed."""

from collections.abc import Iterable
from pathlib import Path

from opt_common.errors import CheckpointError


def refuse_links_outside(index: Path, shards: Iterable[Path]) -> None:
    """Make sure that shards lie where their index lies, or where the index's own link leads.

    The hub's cache is made of links: index and shards lead to one directory. A link that leads elsewhere is no part of
    what was fetched.

    Raises:
        CheckpointError: naming every shard that lies elsewhere.
    """
    places = {index.parent.resolve(), index.resolve().parent}
    outside = sorted({path.name for path in shards if path.resolve().parent not in places})
    if outside:
        shown = ", ".join(outside[:5]) + (f" and {len(outside) - 5} more" if len(outside) > 5 else "")
        raise CheckpointError(
            f"{index.parent} has links out of it in place of {shown}. "
            f"Don't trust this checkpoint; if the links are your own, name the directory that they lead to."
        )
