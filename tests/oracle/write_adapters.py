"""Have each framework read PEFT's golden adapters and write them again, for `check_peft.py`, which has PEFT only.

python tests/oracle/write_adapters.py DIRECTORY
"""

import sys
from pathlib import Path

import numpy as np

from tests.conftest import adapter as backend_of
from tests.test_lora import CASES, outputs, with_adapter


def main() -> None:
    """Write `DIRECTORY/<framework>/<case>`, with the framework's own results in `outputs.npz`."""
    for name in ("torch", "tf", "flax"):
        backend = backend_of(name)
        for case in CASES:
            model = with_adapter(backend, case)
            target = Path(sys.argv[1]) / name / case
            model.save_adapter(target)
            np.savez(target / "outputs.npz", **outputs(backend, model, case))
            print(target)


if __name__ == "__main__":
    main()
