"""The input of a number, and what is done with it: open it, convert it, look for what is wrong with it."""

import dataclasses
import functools
import json
import random
import shutil
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from conversion import convert, open_checkpoint
from conversion.checkpoint import checked_parameters
from conversion.doctor import doctor
from conversion.inspect import inspect
from opt_common.config import OPTConfig
from opt_common.errors import CheckpointError, ConfigError
from opt_common.hub import CONFIG_FILE, FORMATS
from opt_common.params import parameter_table
from tests.fuzz import mutators, others, seeds
from tests.fuzz.guard import CONSTANT, FACTOR, Hang, watched

Files = Mapping[str, bytes]

FINDINGS = ("crash", "hang", "execution", "oversize", "wrong")
"""What may not become of an input. "wrong" is a file that another library reads otherwise."""

TARGETS = ("safetensors", "torch", "tf", "flax", "metaseq")


def _spoilt(find: Callable[[], tuple[seeds.Seed, ...]], mutate: mutators.Mutator) -> Callable[[random.Random], Files]:
    def make(rng: random.Random) -> Files:
        seed = rng.choice(find())
        return {**seed.files, seed.target: mutate(rng, seed.content)}

    return make


def _config(rng: random.Random) -> Files:
    seed = rng.choice(seeds.checkpoints(rng.choice(tuple(FORMATS))))
    return {**seed.files, CONFIG_FILE: mutators.config(rng, seed.files[CONFIG_FILE])}


def _index(rng: random.Random) -> Files:
    """Shards whose index is spoilt, or of which one is absent, another one's copy, or spoilt itself."""
    name = rng.choice(tuple(FORMATS))
    seed = rng.choice(seeds.checkpoints(name, sharded=True))
    index = FORMATS[name].index
    files = dict(seed.files)
    shards = [file for file in files if FORMATS[name].is_shard(file)]
    choice = rng.random()
    if choice < 0.7:
        files[index] = mutators.json_file(rng, files[index])
    elif choice < 0.8:
        del files[rng.choice(shards)]
    elif choice < 0.9:
        files[rng.choice(shards)] = files[rng.choice(shards)]
    else:
        shard = rng.choice(shards)
        files[shard] = _MUTATORS[name](rng, files[shard])
    return files


def _metaseq(rng: random.Random) -> Files:
    """Parts, shards, arguments and the description of flattened parameters are all in the pickles and in the names."""
    seed = rng.choice(seeds.metaseq())
    files = dict(seed.files)
    target = rng.choice([name for name in files if name.endswith(".pt")])
    if rng.random() < 0.9:
        files[target] = mutators.torch(rng, files[target])
    if rng.random() < 0.15:
        names = ("reshard-model_part-7.pt", "reshard-model_part-0-shard1.pt", "restored.pt", "x-shard9.pt", "y.pt")
        files[rng.choice(names)] = files[target] if rng.random() < 0.5 else files.pop(target)
    return files


_MUTATORS: Mapping[str, mutators.Mutator] = {
    "safetensors": mutators.safetensors,
    "torch": mutators.torch,
    "tf": mutators.hdf5,
    "flax": mutators.flax,
}

KINDS: Mapping[str, Callable[[random.Random], Files]] = {
    **{name: _spoilt(functools.partial(seeds.checkpoints, name), mutate) for name, mutate in _MUTATORS.items()},
    "torch by PyTorch": _spoilt(functools.partial(seeds.by_pytorch, old=False), mutators.torch),
    "torch before 1.6": _spoilt(functools.partial(seeds.by_pytorch, old=True), mutators.torch_old),
    "metaseq": _metaseq,
    "config": _config,
    "index": _index,
}
"""How to make an input of each kind."""


def kind_of(number: int) -> str:
    """The kind of an input."""
    return tuple(KINDS)[number % len(KINDS)]


def make(seed: int, number: int) -> tuple[str, Files]:
    """The input of a number: its kind and its files. The same for the same seed and number, on every machine."""
    rng = random.Random(f"{seed}:{number}")
    kind = kind_of(number)
    return kind, KINDS[kind](rng)


# What is done with an input


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of an input.

    Attributes:
        kind: of the input, a key of `KINDS`.
        action: what was done with it, a key of `ACTIONS`.
        result: "loaded", "refused", or a finding: "crash", "hang", "execution", "oversize" or "wrong".
        detail: of a finding, what happened.
        allocated: bytes at the peak, and bytes of the input.
    """

    kind: str
    action: str
    result: str
    detail: str = ""
    allocated: tuple[int, int] = (0, 0)

    @property
    def is_finding(self) -> bool:
        """Whether the reader did what it may not."""
        return self.result in FINDINGS


class WrongError(Exception):
    """A file was read otherwise than another library reads it."""


def _load(directory: Path, _: Path) -> None:
    with open_checkpoint(directory) as checkpoint:
        for name in checkpoint.names:
            array, info = checkpoint.read(name), checkpoint.info(name)
            if (array.dtype, array.shape, array.flags.writeable) != (info.dtype, info.shape, False):
                raise WrongError(f"{name} is {array.dtype} {array.shape}, was said to be {info}")
            array.tobytes()
        checked_parameters(checkpoint, parameter_table(checkpoint.config, head=checkpoint.head), other_heads=False)


def _inspect(directory: Path, _: Path) -> None:
    json.dumps(inspect(directory).to_dict())


def _doctor(directory: Path, _: Path) -> None:
    if not doctor(directory).healthy:
        raise CheckpointError("a finding of the doctor is what another action refuses")


def _convert(directory: Path, place: Path) -> None:
    # The target is chosen by the source's size, so that the same input does the same.
    size = sum(path.stat().st_size for path in directory.iterdir())
    target = place / "target"
    convert(directory, target, TARGETS[size % len(TARGETS)])
    OPTConfig.from_json_file(target / CONFIG_FILE)


ACTIONS: Mapping[str, Callable[[Path, Path], None]] = {
    "load": _load,
    "inspect": _inspect,
    "doctor": _doctor,
    "convert": _convert,
}

_ACTIONS_IN_TURN = ("load", "load", "load", "doctor", "inspect", "load", "convert")
ROUND = len(_ACTIONS_IN_TURN)
"""Number of inputs of a kind after which each action has had its turn."""


def attempt(seed: int, number: int, place: Path) -> Outcome:
    """Make an input in an empty directory, and read it.

    Args:
        seed: of the whole run.
        number: of the input.
        place: a directory of this process's own, whose contents are replaced.
    """
    kind, files = make(seed, number)
    action = _ACTIONS_IN_TURN[number // len(KINDS) % ROUND]
    source, target = place / "source", place / "made"
    for directory in (source, target):
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, content in files.items():
        (source / name).write_bytes(content)
    size = sum(map(len, files.values()))
    with watched(source, target if action == "convert" else None) as watch:
        error = _tried(ACTIONS[action], source, target)
    result, detail = _judged(error)
    if watch.violations:
        result, detail = "execution", "; ".join(watch.violations)
    elif watch.peak > FACTOR * size + CONSTANT and result in ("loaded", "refused"):
        result, detail = "oversize", f"{watch.peak} bytes for a checkpoint of {size}"
    if result == "loaded" and (difference := others.difference(kind, source)):
        result, detail = "wrong", difference
    return Outcome(kind, action, result, detail, (watch.peak, size))


def _tried(action: Callable[[Path, Path], None], source: Path, target: Path) -> BaseException | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", ".*model-parallel parts.*")  # a sentence of ours, about copies
            action(source, target)
    except (Exception, Hang) as error:  # whatever it is, it is judged
        return error
    return None


def _judged(error: BaseException | None) -> tuple[str, str]:
    """The result that an error means, and its story if it is a finding."""
    if error is None:
        return "loaded", ""
    if isinstance(error, CheckpointError | ConfigError):
        try:
            str(error).encode()
        except UnicodeEncodeError:
            return "crash", f"a message that can't be printed: {error!a:.500}"
        return "refused", ""
    story = "".join(traceback.format_exception(error, limit=-4))
    return {Hang: "hang", WrongError: "wrong"}.get(type(error), "crash"), story
