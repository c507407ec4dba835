# `make demo` and `make test` work on a fresh machine with Python 3.11 or newer; see README.md.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-gpu lint format clean

demo: .venv/runtime  ## install, draw shapes, train, evaluate, picture
	$(BIN)/python -m pix2seq.shapes data/shapes
	$(BIN)/python train.py --config configs/demo.yaml --root data/shapes --resume auto
	$(BIN)/python evaluate.py --checkpoint runs/demo/best --root data/shapes --output_dir runs/demo
	@echo "look at runs/demo/predictions.png (ground truth beside predictions) and runs/demo/samples/"
	@echo "next: $(BIN)/accelerate launch train.py --root /path/to/coco --project_name my-detector"

test: .venv/dev  ## install, run the fast tests
	$(BIN)/python -m pytest

test-slow: .venv/dev  ## the tests that take minutes: training to a given AP
	$(BIN)/python -m pytest -m slow

test-gpu: .venv/dev  ## what only a GPU can show
	$(BIN)/python -m pytest -m gpu

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv

.venv/runtime: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: requirements-dev.txt requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@
