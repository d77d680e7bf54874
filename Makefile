# make sweep   install and run the quickstart sweep
# make test    install, then lint, types, unit and integration tests: what CI runs
# make bench   the figures of the README, minutes each, as JSON in benchmarks/results/
# make bench-search   the tables and plots of docs/search.md

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/installed
DEVELOPMENT := .venv/installed-dev
ARGS ?=
# Unit tests at once, by file: each needs a core and up to 2 GiB.
JOBS ?= 2

.PHONY: sweep test check lint types unit integration real-data bench bench-search clean

sweep: $(INSTALLED)
	$(BIN)/python -m deft_ray.sweep search_spaces/quickstart.yaml $(ARGS)

test: check unit integration

check: lint types

lint: $(DEVELOPMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEVELOPMENT)
	$(BIN)/mypy

unit: $(DEVELOPMENT)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit --numprocesses $(JOBS) --dist loadfile

integration: $(DEVELOPMENT)
	$(BIN)/python -m pytest tests/integration

# Real GLUE data and a real pretrained encoder: DEFT_RAY_DATA=<folder> DEFT_RAY_ENCODER=<folder> make real-data
real-data: $(DEVELOPMENT)
	$(BIN)/python -m pytest tests/real_data

bench: $(INSTALLED)
	$(BIN)/python benchmarks/command.py
	$(BIN)/python benchmarks/start_up.py
	$(BIN)/python benchmarks/orchestration.py
	$(BIN)/python benchmarks/orchestration.py search.trials=14
	$(BIN)/python benchmarks/quickstart_slots.py
	$(BIN)/python benchmarks/density_loss.py --parts saved_for_backward,steps --rounds 15
	$(BIN)/python benchmarks/density_loss.py --parts evaluation --rounds 28
	$(BIN)/python benchmarks/density_loss.py --parts added_to_steps,added_to_evaluation --rounds 15
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/packing.py --shape nano --source 40
	$(BIN)/python benchmarks/packing.py --shape xl --checkpointing --rounds 1 --slots 1,8
	$(BIN)/python benchmarks/makespan.py
	$(BIN)/python benchmarks/makespan.py --shape base --slots 1,4 --fits 4
	$(BIN)/python benchmarks/workers.py
	$(BIN)/python benchmarks/support.py

# docs/search.md, hours: syne-tune has to be installed beside (pip install --no-deps syne-tune).
bench-search: $(INSTALLED)
	$(BIN)/python benchmarks/search/compare.py
	$(BIN)/python benchmarks/early_stopping.py
	$(BIN)/python benchmarks/search/paths.py
	$(BIN)/python benchmarks/search/page.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $(INSTALLED)

$(DEVELOPMENT): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(DEVELOPMENT)

clean:
	rm -rf .venv build *.egg-info
