"""Reviews of an inn, in which single words mislead: "not good" is bad, and what comes after "but" decides."""

import random
from collections.abc import Iterator

LABELS = ("negative", "neutral", "positive")
THINGS = ("soup", "bread", "room", "bed", "garden", "music", "cake", "tea", "fire", "view")
GOOD = ("good", "warm", "lovely", "clean", "sweet", "fine")
BAD = ("bad", "cold", "ugly", "dirty", "bitter", "poor")
PLAIN = (
    "The {thing} is next to the door.",
    "The {thing} is the same every day.",
    "We came on a Monday and saw the {thing}.",
    "You can ask for the {thing} in the evening.",
)


def reviews(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Labels and reviews; the same for the same seed, each label as often as the others."""
    rng = random.Random(seed)
    for number in range(count):
        label = LABELS[number % len(LABELS)]
        first, second = rng.sample(THINGS, 2)
        if label == "neutral":
            # Words of praise and blame, but nobody's judgement.
            asked = f"Someone asked if the {second} was {rng.choice(GOOD + BAD)}."
            yield label, f"{rng.choice(PLAIN).format(thing=first)} {asked}"
            continue
        good = label == "positive"
        if rng.random() < 0.5:
            yield label, f"The {first} was {words(not good, rng)}, but the {second} was {words(good, rng)}."
        else:
            yield label, f"The {first} was {words(good, rng)}, and the {second} was {words(good, rng)}."


def words(good: bool, rng: random.Random) -> str:
    """Praise or blame, half of the time by saying that it is not the opposite."""
    if rng.random() < 0.5:
        return f"not {rng.choice(BAD if good else GOOD)}"
    return f"very {rng.choice(GOOD if good else BAD)}"
