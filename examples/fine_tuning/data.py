"""The log of a lighthouse: a text of its own kind, in which much follows from what was said before."""

import random
from collections.abc import Iterator

WINDS = {
    "weak": ("calm", "The boats went out before the sun was up."),
    "fresh": ("a little rough", "The boats went out, but stayed near the shore."),
    "strong": ("rough", "Only the big boat went out."),
    "wild": ("very high", "All the boats stayed in the harbor."),
}
QUARTERS = ("north", "east", "south", "west")
NUMBERS = ("No ship", "One ship", "Two ships", "Three ships", "Four ships", "Five ships")
KEEPERS = ("Anna", "Tom", "Rosa", "Peter")
WORKS = {
    "glass": "cleaned the glass of the lamp",
    "stairs": "swept the stairs",
    "door": "painted the door",
    "rope": "mended the long rope",
    "clock": "set the clock",
}


def entries(count: int, seed: int) -> Iterator[str]:
    """Entries of the log, one a day; the same for the same seed."""
    rng = random.Random(seed)
    for _ in range(count):
        wind = rng.choice(list(WINDS))
        sea, boats = WINDS[wind]
        quarter, keeper, work = rng.choice(QUARTERS), rng.choice(KEEPERS), rng.choice(list(WORKS))
        ships = rng.choice(NUMBERS)
        yield (
            f"Log of the lighthouse. The wind was {wind} and came from the {quarter}. The sea was {sea}. {boats} "
            f"{ships} passed in the night. {keeper} had the watch and {WORKS[work]}. "
            f"{keeper} wrote: wind {wind} from the {quarter}, sea {sea}, {ships.lower()}, {work} done."
        )
