"""Damaged and hostile checkpoints out of a seed: what every reader must survive.

seeds     small valid checkpoints of every format
values    the numbers, texts and JSON values that break parsers
mutators  one for each format: where its lengths, offsets, shapes and paths are, and how to change them
guard     what an input may not do: run code, write, leave its directory, take too long or too much memory
inputs    the input of a number, and what is done with it
run       many inputs in several processes, `python -m tests.fuzz.run`
"""
