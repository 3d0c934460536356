# Python 3.11 or newer is all that must be there; each command does its own set-up in .venv.
PYTHON ?= python3
BIN := .venv/bin
# More processes than cores, for tests mostly wait; so OpenMP's threads must not spin while they do.
TOGETHER := --numprocesses 6 --dist loadgroup -m "not alone"
test test-full: export OMP_WAIT_POLICY = passive

.PHONY: serve test test-full lint bench bench-short soak

serve: .venv/serve
	$(BIN)/gunicorn -c gunicorn.conf.py

test: .venv/test
	$(BIN)/pytest $(TOGETHER)
	$(BIN)/pytest -m alone

test-full: .venv/test
	$(BIN)/pytest --full $(TOGETHER)
	$(BIN)/pytest --full -m alone

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy app.py gunicorn.conf.py model bench tests/lib

soak: .venv/test
	$(BIN)/python -m tests.soak

bench: .venv/bench
	$(BIN)/python -m bench.run

bench-short: .venv/bench
	$(BIN)/python -m bench.run --short

.venv/serve: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=…" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

.venv/test: .venv/serve requirements-onnx.txt requirements-pandas.txt bench/requirements.txt tests/requirements.txt
	{ command -v curl && command -v wrk; } >/dev/null || { apt-get update -qq && apt-get install -qq --yes curl wrk; }
	$(BIN)/pip install --quiet --requirement tests/requirements.txt
	touch $@

.venv/bench: .venv/serve requirements-onnx.txt bench/requirements.txt
	-command -v wrk >/dev/null || { apt-get update -qq && apt-get install -qq --yes wrk; }
	$(BIN)/pip install --quiet --requirement bench/requirements.txt
	touch $@
