"""Recipes: what is listed at first comes back in the steps."""

import random
from collections.abc import Iterator

FRUITS = ("apples", "pears", "plums", "berries", "nuts", "carrots", "mushrooms", "beans")
DISHES = {"soup": "pot", "pie": "oven", "salad": "bowl", "stew": "pan"}
NUMBERS = ("two", "three", "four", "five", "six", "seven")
EXTRAS = ("honey", "salt", "butter", "milk", "cheese", "herbs")
MINUTES = ("ten", "twenty", "thirty", "forty")


def recipes(count: int, seed: int) -> Iterator[str]:
    """Recipes; the same for the same seed."""
    rng = random.Random(seed)
    for _ in range(count):
        first, second = rng.sample(FRUITS, 2)
        one, two = rng.choice(NUMBERS), rng.choice(NUMBERS)
        dish, extra, minutes = rng.choice(list(DISHES)), rng.choice(EXTRAS), rng.choice(MINUTES)
        yield (
            f"Recipe. {first.capitalize()} and {second} {dish}. You need: {one} {first}, {two} {second}, some {extra}. "
            f"Step one: wash the {one} {first}. Step two: cut the {two} {second}. "
            f"Step three: put the {first} and the {second} into the {DISHES[dish]} with the {extra}. "
            f"Step four: wait {minutes} minutes. After {minutes} minutes the {dish} is ready."
        )
