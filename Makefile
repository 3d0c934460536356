# Python 3.11 or newer is all that must be there; each command does its own set-up in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: serve test lint

serve: .venv/serve
	$(BIN)/gunicorn -c gunicorn.conf.py

test: .venv/test
	$(BIN)/pytest

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy app.py gunicorn.conf.py model

.venv/serve: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=…" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

.venv/test: .venv/serve requirements-pandas.txt tests/requirements.txt
	command -v curl >/dev/null || { apt-get update -qq && apt-get install -qq --yes curl; }
	$(BIN)/pip install --quiet --requirement tests/requirements.txt
	touch $@
