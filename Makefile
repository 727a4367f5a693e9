# On a machine with git, make and Python 3.11: `make demo` runs the main job, `make test` proves it.
# Both set up .venv first; the second time that costs nothing.

PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV ?= .venv
EXTRAS ?= all-cpu,test,dev,docs,examples
WORKERS ?= 2
PYTEST_ARGS ?=

bin := $(VENV)/bin
ready := $(VENV)/.ready
# One thread a worker: two workers with two threads each would fight over two cores.
one_thread := OMP_NUM_THREADS=1 TF_CPP_MIN_LOG_LEVEL=2

.DEFAULT_GOAL := help
.PHONY: help setup demo test check lint types contracts docs unit format kills bench-conversion oracle oracle-keras-hub isolated peft trainer clean

help:  ## list the targets
	@awk -F ':.*## +' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(ready): pyproject.toml constraints.txt $(wildcard opt_common/native/*.[ch])
	@echo 'Setting up $(VENV): some minutes the first time.'
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

setup: $(ready)  ## make the environment

demo: $(ready)  ## the bundled model in three frameworks, converted around and verified
	@$(bin)/python examples/demo.py

test: check unit  ## every check and every test

check: lint types contracts docs  ## everything but the tests

lint: $(ready)  ## ruff and codespell
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/codespell

types: $(ready)  ## pyright
	$(bin)/pyright --pythonpath $(bin)/python

contracts: $(ready)  ## who may import whom
	$(bin)/lint-imports

docs: $(ready)  ## build site/, warnings are errors
	$(bin)/python docs/make_parameters.py --check
	$(bin)/python docs/make_performance.py --check
	$(bin)/mkdocs build --strict --quiet

unit: $(ready)  ## pytest
	$(one_thread) $(bin)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

format: $(ready)  ## mend what can be mended by machine
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
	$(bin)/python docs/make_parameters.py
	$(bin)/python docs/make_performance.py

kills: $(ready)  ## conversions killed, out of disk, source changed: 200 of each (some minutes)
	$(one_thread) $(bin)/python -W error -m tests.kill_runs --kills 200 --full 200 --changes 200

BENCH_DIR ?= /tmp/opt-bench

bench-conversion: $(ready)  ## memory and time of all pairs of formats on 5.3 GB, against cp (an hour, 25 GB of disk)
	$(bin)/python -m benchmarks.conversion --directory $(BENCH_DIR) --json conversion.json

oracle: .venv-oracle/.ready  ## what we write loads in transformers 4.57.6 (an environment of its own)
	PYTHONPATH=. TF_USE_LEGACY_KERAS=1 TF_CPP_MIN_LOG_LEVEL=2 .venv-oracle/bin/python tests/oracle/check_transformers_loads.py
	PYTHONPATH=. TF_USE_LEGACY_KERAS=1 TF_CPP_MIN_LOG_LEVEL=2 .venv-oracle/bin/python tests/oracle/check_heads_load.py

.venv-oracle/.ready: tests/oracle/requirements.txt
	test -x .venv-oracle/bin/python || $(PYTHON) -m venv .venv-oracle
	.venv-oracle/bin/python -m pip install --quiet --disable-pip-version-check -r tests/oracle/requirements.txt
	touch $@

oracle-keras-hub: .venv-keras-hub/.ready  ## KerasHub loads what we write, and we what it writes (an environment of its own)
	PYTHONPATH=. KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=2 .venv-keras-hub/bin/python tests/oracle/check_keras_hub.py
	PYTHONPATH=. KERAS_BACKEND=jax TF_CPP_MIN_LOG_LEVEL=2 .venv-keras-hub/bin/python tests/oracle/check_keras_hub.py

.venv-keras-hub/.ready: tests/oracle/requirements-keras-hub.txt
	test -x .venv-keras-hub/bin/python || $(PYTHON) -m venv .venv-keras-hub
	.venv-keras-hub/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

FUZZ ?= 100000

.PHONY: fuzz
fuzz: $(ready)  ## read 100,000 damaged checkpoints (FUZZ=N: another number); the tests read 2,000
	$(one_thread) $(bin)/python -W ignore -m tests.fuzz.run --count $(FUZZ) --workers $(WORKERS)

peft: $(ready) .venv-peft/.ready  ## the PyTorch model in PEFT, and every backend's adapters (an environment of its own)
	rm -rf build/adapters
	PYTHONPATH=. $(one_thread) $(bin)/python tests/oracle/write_adapters.py build/adapters
	PYTHONPATH=. OMP_NUM_THREADS=1 .venv-peft/bin/python tests/oracle/check_peft.py build/adapters

trainer: .venv-peft/.ready  ## the PyTorch models in transformers.Trainer and accelerate (the environment of `make peft`)
	PYTHONPATH=. OMP_NUM_THREADS=1 .venv-peft/bin/python tests/oracle/check_trainer.py

.venv-peft/.ready: tests/oracle/requirements-peft.txt
	test -x .venv-peft/bin/python || $(PYTHON) -m venv .venv-peft
	.venv-peft/bin/python -m pip install --quiet --disable-pip-version-check -r tests/oracle/requirements-peft.txt
	touch $@

kinds := none torch tf flax
extra_torch := [torch]
extra_tf := [tf-cpu]
extra_flax := [flax]

.PHONY: $(kinds:%=isolated-%)
isolated: $(kinds:%=isolated-%)  ## one framework at a time, each in an environment of its own

$(kinds:%=isolated-%): isolated-%: .venv-%/.ready
	TF_CPP_MIN_LOG_LEVEL=2 .venv-$*/bin/python -m tests.isolated.check $*

$(kinds:%=.venv-%/.ready): .venv-%/.ready: pyproject.toml constraints.txt
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.$(extra_$*)'
	touch $@

clean:  ## remove every environment and build output
	rm -rf $(VENV) .venv-* build site *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
