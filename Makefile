# make repro: run the experiment; make test: run the tests; make check: lint, format and types;
# make deps: bring the source dependencies in dvc.yaml up to date; make ui: open MLflow.
PYTHON ?= python3
GPU := $(shell command -v nvidia-smi 2>/dev/null)
LOCK := $(if $(GPU),requirements-cuda.lock,requirements-cpu.lock)
# uv does not read pip's setting for local wheels; without such wheels, a CPU machine gets CPU builds.
LINKS := $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
TORCH := $(if $(LINKS),UV_FIND_LINKS="$(LINKS)",$(if $(GPU),,UV_TORCH_BACKEND=cpu))
BIN := $(CURDIR)/.venv/bin
RUN := PATH="$(BIN):$$PATH"

.PHONY: repro test check deps ui chaos
repro: .venv/ready
	$(RUN) boltlm check
	$(RUN) dvc repro

test: .venv/ready
	$(RUN) python -m pytest -n 2 --dist loadfile

# Hours; CHAOS="--kills 20 --seed 2" for fewer kills or another seed.
chaos: .venv/ready
	$(RUN) python -m tests.chaos $(or $(FOLDER),/tmp/boltlm-chaos/one) $(CHAOS)

check: .venv/ready
	$(RUN) ruff check . && $(RUN) ruff format --check . && $(RUN) pyright

deps: .venv/ready
	$(RUN) python -m tests.stage_deps

ui: .venv/ready
	$(RUN) python -m boltlm.reporting.mlflow_ui

.venv/ready: $(LOCK) pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet uv==0.13.8
	$(TORCH) $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -r $(LOCK) -e .
	touch $@
