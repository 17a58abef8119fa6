"""Writes people-train.jsonl and people-test.jsonl: sentences with a name and an age.

python examples/reward/people.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path

NAMES = [
    "Anna",
    "Bela",
    "Chen",
    "Dora",
    "Emil",
    "Fay",
    "Gus",
    "Hana",
    "Ivo",
    "Jun",
    "Kira",
    "Leo",
    "Mina",
    "Nils",
    "Ola",
    "Pia",
    "Quinn",
    "Rosa",
    "Sven",
    "Tara",
]
SENTENCES = (
    "{name} is {age} and lives by the sea.",
    "At {age}, {name} still rides a bicycle to work.",
    "My neighbour {name} turned {age} last week.",
    "{name}, aged {age}, teaches the violin.",
    "Nobody believes that {name} is {age} years old.",
)


def main() -> None:
    """Write both files beside this script; names of one are not in the other."""
    draw = random.Random(0)
    for split, names in (("train", NAMES[:14]), ("test", NAMES[14:])):
        rows = [(name, sentence, draw.randint(18, 90)) for name in names for sentence in SENTENCES]
        lines = [
            json.dumps({"text": sentence.format(name=name, age=age), "name": name, "age": age})
            for name, sentence, age in rows
        ]
        (Path(__file__).parent / f"people-{split}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
