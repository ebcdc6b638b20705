# demo: environment, data, model, training, test, table. check: style and types. test: everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart/latest

.PHONY: demo check test install docs benchmark

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed; make PYTHON=python3.12 ..."'
	$(PYTHON) -m venv $(VENV)
	start=$$(date +%s); $(BIN)/python -m pip install -e '.[dev,docs]' && echo $$(( $$(date +%s) - start )) > $@

demo: install
	$(BIN)/python -m project fit --config configs/quickstart.yaml
	$(BIN)/python -m project test --config $(RUN)/config.yaml --ckpt_path $(RUN)/checkpoints/last.ckpt
	$(BIN)/python -m project table $(RUN)/results/fit.json $(RUN)/results/test.json --stages
	@echo "installation took $$(cat $(VENV)/.installed) s when it was made"

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

benchmark: install
	$(BIN)/python -m project benchmark --config $(RUN)/config.yaml --ckpt_path $(RUN)/checkpoints/last.ckpt --only engine --seconds 300
