"""Which operations does a workload's time go to? By the profilers of PyTorch and JAX.

    python -m benchmarks.operations opt_flax --workload train:4x256 --work /some/dir   # or opt_torch

Printed are the operations that take most, with the time of each by itself, without those that it calls, in
milliseconds of one run after a first one. Numbers that tell operations of one kind apart are left off. What several
threads do at once is counted once for each; what goes on in the package's library is not PyTorch's to see.
"""

import argparse
import collections
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import make
from benchmarks.speed_systems import SYSTEMS, VOCABULARY
from opt_common.workloads import Workload, seconds_of

Times = dict[str, tuple[float, int]]
"""Milliseconds and number of the operations of each kind."""


def torch_times(run: Callable[[], Any]) -> Times:
    """By PyTorch's profiler."""
    import torch

    with torch.profiler.profile() as profile:
        run()
    return {each.key: (each.self_cpu_time_total / 1e3, each.count) for each in profile.key_averages()}


def flax_times(run: Callable[[], Any]) -> Times:
    """By JAX's profiler: what XLA's threads did."""
    import jax

    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        [path] = Path(directory).rglob("*.xplane.pb")
        profile: Any = jax.profiler.ProfileData.from_file(str(path))
        lines = [line for plane in profile.planes for line in plane.lines if line.name.startswith("tf_XLA")]
        found: Times = {}
        for line in lines:
            for name, own in own_times((each.start_ns, each.duration_ns, each.name) for each in line.events):
                kind = re.sub(r"[.\d]+$", "", name)
                time, count = found.get(kind, (0.0, 0))
                found[kind] = (time + own / 1e6, count + 1)
    return found


def own_times(events: Iterable[tuple[float, float, str]]) -> Iterator[tuple[str, float]]:
    """The name of each event of a thread, and its duration less those of the events within it."""
    within = collections.deque[list[Any]]()
    for start, duration, name in sorted(events, key=lambda event: (event[0], -event[1])):
        while within and within[-1][0] <= start:
            _, own, done = within.pop()
            yield done, own
        if within:
            within[-1][1] -= duration
        within.append([start + duration, duration, name])
    for _, own, name in within:
        yield name, own


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", help="opt_torch or opt_flax, and :DTYPE[:BITS]")
    parser.add_argument("--workload", default="train:4x256", help="see `opt-torch bench --help`")
    parser.add_argument("--shape", default="125m", help="shape of the model (default: 125m)")
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints are kept")
    parser.add_argument("--most", type=int, default=16, help="kinds to print (default: 16)")
    arguments = parser.parse_args()
    kind, *options = arguments.system.split(":")
    times_of = {"opt_torch": torch_times, "opt_flax": flax_times}.get(kind)
    if times_of is None:
        parser.error(f"{kind} has no profiler here. Use opt_torch or opt_flax.")
    system: Any = SYSTEMS[kind](make(arguments.work / arguments.shape, arguments.shape), *options)
    workload = Workload.parse(arguments.workload)
    ids_BT = workload.prompts(VOCABULARY, 0)

    def run() -> Any:
        return system.train(ids_BT) if workload.kind == "train" else system.generate(ids_BT, workload.new_tokens)

    run()
    print(f"{seconds_of(run) * 1e3:9.1f} ms in all, without a profiler")
    found = sorted(times_of(run).items(), key=lambda each: -each[1][0])
    for name, (time, count) in found[: arguments.most]:
        print(f"{time:9.1f} ms {count:6} {name}")


if __name__ == "__main__":
    main()
