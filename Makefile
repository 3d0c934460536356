# Python 3.11 or newer is all that must be there; each command does its own set-up in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CLIENTS := .venv-clients
# Four processes on two cores, for tests also wait; so OpenMP's threads must not spin while they do.
TOGETHER := --numprocesses 4 --dist loadgroup -m "not alone"
ALONE = --numprocesses 1 -m alone $(shell grep --files-with-matches pytest.mark.alone tests/test_*.py)
test test-full test-short test-oldest: export OMP_WAIT_POLICY = passive
# Compiled code is kept, whatever the machine's owner prefers: hundreds of processes import the same.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help serve test test-full test-short test-oldest lint soak bench bench-short
.DEFAULT_GOAL := help

# An environment that has another Python than the one that is asked for is made anew.
ifneq ($(origin PYTHON),file)
ifneq ($(shell { $(BIN)/python -V; } 2>/dev/null),$(shell $(PYTHON) -V))
.PHONY: $(VENV)/serve
CLEAR := --clear
endif
endif

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.* ## /\1 /p' $(MAKEFILE_LIST) | while read -r target what; do printf '%-12s %s\n' "$$target" "$$what"; done

serve: $(VENV)/serve ## serve what settings.toml says
	$(BIN)/gunicorn -c gunicorn.conf.py

test: $(VENV)/test $(CLIENTS)/clients ## run the tests
	$(BIN)/pytest $(TOGETHER)
	$(BIN)/pytest $(ALONE)

test-full: $(VENV)/test $(CLIENTS)/clients ## run the tests in full size, as CI does
	$(BIN)/pytest --full $(TOGETHER)
	$(BIN)/pytest --full $(ALONE)

test-short: $(VENV)/test ## run a selection of them, as CI does on further Pythons
	$(BIN)/pytest $(TOGETHER) $(patsubst %,tests/test_%.py,artifact contract development golden parity predictor)

# The sweep over scikit-learn's estimators, without iris, which a newer version has saved.
test-oldest: ## serve the estimators of the oldest scikit-learn that is supported
	$(MAKE) VENV=.venv-oldest .venv-oldest/oldest
	.venv-oldest/bin/pytest $(TOGETHER) tests/test_estimators.py tests/test_inputs.py -k "not iris"

lint: $(VENV)/test ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy app.py gunicorn.conf.py serving processes model bench tests/lib

soak: $(VENV)/test ## look for lost requests and for growth, in 4 minutes
	$(BIN)/python -m tests.soak

bench: $(VENV)/bench ## measure, and write bench/results.md and its plot, in 15 minutes
	$(BIN)/python -m bench.run

bench-short: $(VENV)/bench ## take a look at the figures, in a minute
	$(BIN)/python -m bench.run --short

$(VENV)/serve: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=…" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(CLEAR) $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/test: $(VENV)/serve requirements-onnx.txt requirements-onnx-boosting.txt requirements-pandas.txt bench/requirements.txt tests/requirements.txt
	{ command -v chromedriver && command -v curl && command -v haproxy && command -v node && command -v wrk; } >/dev/null || { apt-get update -qq && apt-get install -qq --yes chromium chromium-driver curl haproxy nodejs wrk; }
	$(BIN)/pip install --quiet --requirement tests/requirements.txt
	touch $@

$(CLIENTS)/clients: tests/requirements-clients.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --requirement tests/requirements-clients.txt
	touch $@

$(VENV)/bench: $(VENV)/serve requirements-onnx.txt bench/requirements.txt
	-command -v wrk >/dev/null || { apt-get update -qq && apt-get install -qq --yes wrk; }
	$(BIN)/pip install --quiet --requirement bench/requirements.txt
	touch $@

$(VENV)/oldest: $(VENV)/test tests/requirements-oldest.txt
	$(BIN)/pip install --quiet --requirement tests/requirements-oldest.txt
	touch $@
