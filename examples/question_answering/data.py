"""Questions about who lives where, likes what and has what, in the form of SQuAD.

A decoder reads from left to right. So the question comes first, and in the text an answer comes after what it answers.
"""

import random
from typing import Any

NAMES = ("Lily", "Tom", "Anna", "Ben", "Rosa", "Max", "Emma", "Sam", "Nora", "Leo")
PLACES = ("in the forest", "by the river", "on the hill", "near the sea", "in the village", "above the bakery")
FOODS = ("honey", "soup", "cheese", "plums", "bread", "cake")
THINGS = ("a red ball", "a blue kite", "a green boat", "a silver ring", "a yellow hat", "a brown drum")

FACTS = (
    ("Where does {name} live?", "{name} lives {answer}.", PLACES),
    ("What does {name} like?", "{name} likes {answer}.", FOODS),
    ("What does {name} have?", "{name} has {answer}.", THINGS),
)


def questions(count: int, seed: int) -> dict[str, Any]:
    """Texts with a question each; the same for the same seed."""
    rng = random.Random(seed)
    return {"version": "1.1", "data": [{"title": "Neighbors", "paragraphs": [paragraph(rng) for _ in range(count)]}]}


def paragraph(rng: random.Random) -> dict[str, Any]:
    """Facts of two kinds about three people in any order, and a question about one fact."""
    kinds = rng.sample(FACTS, 2)
    facts = [(name, fact, rng.choice(fact[2])) for name in rng.sample(NAMES, 3) for fact in kinds]
    rng.shuffle(facts)
    asked = rng.randrange(len(facts))
    sentences = [sentence.format(name=name, answer=answer) for name, (_, sentence, _), answer in facts]
    name, (question, _, _), answer = facts[asked]
    start = len(" ".join([*sentences[:asked], ""])) + sentences[asked].index(answer, len(name))
    answers = [{"text": answer, "answer_start": start}]
    return {"context": " ".join(sentences), "qas": [{"question": question.format(name=name), "answers": answers}]}
