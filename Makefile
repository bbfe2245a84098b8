# One environment does it all: the first target that needs it makes it.
VENV ?= .venv
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
READY := $(VENV)/.ready

.PHONY: demo test test-oldest support mutation overhead lint pocket pocket-idefics3 clean

demo: $(READY)  ## the model in the box answers questions, dense and reduced
	$(VENV)/bin/adsc demo

test: $(READY)  ## all tests, in as many processes as there are cores
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n auto $(PYTEST)

test-oldest:  ## the engine's tests with the oldest transformers that is supported
	$(MAKE) test VENV=$(VENV)-oldest CONSTRAINTS=constraints-oldest.txt PYTEST="tests/hf tests/accounting"

support: $(READY)  ## the table of supported models, out of its tests
	$(VENV)/bin/python -m pytest -q tests/hf/test_families.py tests/hf/test_support.py \
		--support-table docs/support.md -k 'not test_the_table_is_that_of_these_tests'

mutation: $(READY)  ## one kept index shifted: every check of the matrix has to fail
	$(VENV)/bin/python -m pytest -q --tb=no tests/hf/test_families.py -k 'test_exact or test_greedy' \
		--shift-kept-index results/mutation.json

overhead: $(READY)  ## what an attached engine costs that drops nothing
	$(VENV)/bin/python benchmarks/overhead.py

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

pocket: $(READY)  ## train the model in the box from nothing (hours on two cores, minutes on a GPU; goes on after a kill)
	$(VENV)/bin/torchrun --nproc-per-node 2 -m adsc.pocket.training recipes/pocket.yaml --threads 1
	$(VENV)/bin/python -m adsc.pocket.training recipes/pocket.yaml --export src/adsc/pocket/model
	$(VENV)/bin/python -m adsc.pocket.evaluation --processes 2

pocket-idefics3: $(READY)  ## train a second architecture on the same scenes, for comparison (about an hour on one core)
	$(VENV)/bin/python -m adsc.pocket.training recipes/pocket-idefics3.yaml --threads 1
	$(VENV)/bin/python -m adsc.pocket.training recipes/pocket-idefics3.yaml --export runs/pocket-idefics3/model

ADAPTERS ?= runs/pocket-elastic
CONTROLS ?= runs/pocket-dense
BUDGETS := 1/3 2/9 1/9 1/18
PREDICT := $(VENV)/bin/python -m adsc.pocket.study predict --processes 2

study: $(READY)  ## the main table, out of trained adapters of three seeds ($(ADAPTERS)-SEED); goes on after a kill
	$(PREDICT) --name untrained --condition "downsampled 1/9"
	$(PREDICT) --name untrained --schedules-of $(ADAPTERS)-0/adapter --retained 1 $(BUDGETS)
	for seed in 0 1 2; do \
		$(PREDICT) --name dense --seed $$seed --model $(CONTROLS)-$$seed/adapter && \
		$(PREDICT) --name adsc --seed $$seed --model $(ADAPTERS)-$$seed/adapter --retained 1 $(BUDGETS) || exit 1; \
	done
	$(VENV)/bin/python -m adsc.pocket.study table
	$(VENV)/bin/python -m adsc.report.slope results/pocket/main.json results/pocket/slope.png

$(READY): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip
	$(VENV)/bin/python -m pip install -q -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
