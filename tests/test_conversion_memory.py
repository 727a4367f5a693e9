"""Peak memory of conversions and of loading, in processes of their own. Pages of mapped files count as well."""

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.conversion import FORMATS, MARGIN, largest_tensor, make_model
from conversion import convert, open_checkpoint
from tests.adapters import BACKENDS
from tests.paths import ROOT

LAYERS, HIDDEN, VOCABULARY = 5, 1024, 512

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell peak memory")


@pytest.fixture(scope="module")
def models() -> Iterator[Path]:
    """A directory that holds a model of several times the bound; in memory where there is such a file system."""
    place = Path("/dev/shm")
    roomy = place.is_dir() and shutil.disk_usage(place).free > 4e9
    with tempfile.TemporaryDirectory(dir=place if roomy else None) as directory:
        make_model(Path(directory) / FORMATS[0], layers=LAYERS, hidden=HIDDEN, vocabulary=VOCABULARY)
        yield Path(directory)


def printed(*arguments: str | Path) -> int:
    """The number that a Python process prints."""
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ)
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split()[-1])


def test_a_conversion_takes_two_of_the_largest_tensors_and_no_more(models: Path):
    """metaseq (700 GB for 175B), levanter#506, OLMo-core#661, colibri#543: converters that hold the model, twice.

    Each format is read once and written once, in turns in one file and in several; the benchmark has all pairs.
    """
    source = models / FORMATS[0]
    bound = 2 * largest_tensor(source) + MARGIN
    assert bound < 0.6 * sum(path.stat().st_size for path in source.iterdir())
    for number, (name, to) in enumerate(itertools.pairwise((*FORMATS, FORMATS[0]))):
        target = models / (to if to != FORMATS[0] else "again")
        files = "sharded" if number % 2 else "single"
        peak = printed("-m", "benchmarks.conversion", "--one", models / name, target, to, files)
        assert peak < bound, (name, to, files, peak)
        if name != FORMATS[0]:
            shutil.rmtree(models / name)
    again = models / "again" / "model.safetensors"
    assert again.read_bytes() == (source / "model.safetensors").read_bytes()


def resident(file: Path) -> int:
    """Kilobytes of a mapped file that count as memory of this process."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if "-" in line.split(maxsplit=1)[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.mark.parametrize("name", FORMATS)
def test_opening_a_file_touches_no_page_of_its_map(tmp_path: Path, name: str):
    make_model(tmp_path / FORMATS[0], layers=1, hidden=64, vocabulary=64)
    if name != FORMATS[0]:
        convert(tmp_path / FORMATS[0], tmp_path / name, name)
    with open_checkpoint(tmp_path / name) as checkpoint:
        (file,) = (path for path in (tmp_path / name).iterdir() if path.suffix != ".json")
        array = checkpoint.read(next(iter(checkpoint.names)))
        assert resident(file) == 0
        array.sum()
        assert resident(file) > 0  # else this measures nothing


_LOAD = """
import sys
from pathlib import Path
from benchmarks.conversion import memory
from tests.adapters import ADAPTERS
backend = ADAPTERS[sys.argv[1]]()
backend.load(Path("tests/goldens/pre_ln/safetensors"))
before = memory("VmRSS")
model = backend.load(Path(sys.argv[2]))
print(memory("VmHWM") - before)
"""


@pytest.mark.parametrize("name", BACKENDS)
def test_loading_takes_the_model_and_its_file(models: Path, name: str):
    """transformers#24711, #22224, #16148: 3 GB of weights took 30 GB in Flax.

    The file is mapped, and the system would count what is touched of it: tensors are copied out one by one.
    """
    size = sum(path.stat().st_size for path in (models / FORMATS[0]).iterdir())
    assert printed("-W", "ignore", "-c", _LOAD, name, models / FORMATS[0]) < 1.8 * size
