# every target works from a fresh clone: `setup` comes first and is instant once done
PYTHON ?= $(firstword $(foreach v,python3.11 python3.12 python3,$(shell command -v $(v))))
BIN := .venv/bin

.PHONY: setup demo test test-slow soak lint bench wheel clean

setup:
	@$(PYTHON) tools/setup.py

demo: setup
	$(BIN)/raymem demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/check_commits.py

test: lint
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile

# one test, or those that failed: make test-slow ARGS="-k ntm", ARGS=--last-failed. the table keeps earlier figures
test-slow: setup
	FIGURES_FILE=figures.json $(BIN)/python -m pytest -m "(slow or figures) and not gpu" $(ARGS)

# FAULTS=1000 for a longer one
# FUZZ_S: seconds of each fuzzer, with other examples each time
soak: setup
	FUZZ_S=$(or $(FUZZ_S),40) $(BIN)/python -m pytest --timeout 3000 tests/fuzz
	$(BIN)/python tests/faults/soak.py --faults $(or $(FAULTS),200)
	$(BIN)/python tests/faults/soak.py --faults 20 --over s3
	$(BIN)/python tests/faults/soak.py --faults 20 --each 10 --over cluster

bench: setup
	$(BIN)/python benchmarks/run.py

# from a clean copy: what an earlier build left behind would be shipped
wheel: setup
	rm -rf build dist *.egg-info
	$(BIN)/pip wheel -q --no-deps --no-build-isolation -w dist .
	cp constraints.txt dist/

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis durations.json figures.json
