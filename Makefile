# `make help` lists the targets. `make demo` and `make test` need only Python 3.11 or newer.
# Set variables on the command line (`make demo PYTHON=python3.12`) or in config.env; see config.env.example.
PYTHON := python3
CONSTRAINTS := -c constraints.txt
IMAGE := pix2seq
CACHE := $(HOME)/.cache/huggingface
DATA :=
WORKSPACE :=
RESOURCE_GROUP :=
COMPUTE :=
AZURE_ROOT :=
args :=
docker_args :=
exp :=
nodes := 1
-include config.env

BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(CONSTRAINTS)
DOCKER_RUN = docker run --rm --init --ipc=host --stop-timeout=300 $(shell command -v nvidia-smi > /dev/null && echo --gpus=all) \
	--user="$$(id -u):$$(id -g)" --env=USER=pix2seq --env=HOME=/tmp --env=HF_HOME=/cache --env=HF_TOKEN --env=WANDB_API_KEY \
	--volume="$(CURDIR):/workspace" --volume="$(CACHE):/cache" $(if $(DATA),--volume="$(DATA):/data:ro") $(docker_args)

.PHONY: help demo starter test test-slow test-gpu test-hf lint format clean docker docker-run new-exp job

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s%s\n", $$1, $$2 }' Makefile

demo: .venv/runtime ## install, draw a dataset of shapes, train on it and evaluate (about ten minutes on two cores)
	$(BIN)/python -m pix2seq shapes data/shapes
	$(BIN)/python train.py --config configs/demo.yaml --root data/shapes --resume auto
	$(BIN)/python evaluate.py --checkpoint runs/demo/best --root data/shapes --output_dir runs/demo
	@echo "See runs/demo/predictions.png for the ground truth and the predictions."

starter: .venv/dev ## train the starter detector and write it to pix2seq/starter/model (an hour)
	$(BIN)/python -m pix2seq shapes data/rich --style rich --num_train 10000 --num_val 100
	$(BIN)/python train.py --config configs/starter.yaml --root data/rich --resume auto
	$(BIN)/python -m pix2seq.starter runs/starter/final

test: .venv/dev ## run the fast tests: make test args="tests/test_tokenizer.py -x"
	$(BIN)/python -m pytest $(args)

test-slow: .venv/dev ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow $(args)

test-gpu: .venv/dev ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(args)

test-hf: .venv/hf ## test the tools of Hugging Face, and download and run the test suites of transformers
	$(BIN)/python -m tests.hf.sources
	$(BIN)/python -m pytest -m slow tests/hf $(args)

lint: .venv/dev ## check style, types and import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/dev ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the virtual environment and the build folder
	rm -rf .venv build

docker: ## build the Docker image
	docker build --tag $(IMAGE) deploy/docker

docker-run: docker ## run a command in the container, bash by default: make docker-run args="python -m pytest"
	@mkdir -p "$(CACHE)"
	$(DOCKER_RUN) $$(test -t 0 && echo --interactive --tty) $(IMAGE) $(args)

new-exp: ## create experiments/NAME with a recipe and notes: make new-exp exp=NAME
	mkdir experiments/$(exp)
	sed 's/NAME/$(exp)/g' experiments/template/recipe.yaml > experiments/$(exp)/recipe.yaml
	sed 's/NAME/$(exp)/g' experiments/template/notes.md > experiments/$(exp)/notes.md

job: ## submit the committed state of an experiment to AzureML: make job exp=NAME nodes=2
	@test -z "$$(git status --porcelain)" || { echo "Commit all changes first: the job uploads the last commit."; exit 1; }
	rm -rf build/job && mkdir -p build/job
	git archive HEAD | tar -x -C build/job
	az ml job create --file build/job/deploy/azureml/train.yaml --resource-group $(RESOURCE_GROUP) --workspace-name $(WORKSPACE) \
		--set display_name=$(exp) compute=azureml:$(COMPUTE) inputs.root.path=$(AZURE_ROOT) \
		inputs.recipe=experiments/$(exp)/recipe.yaml resources.instance_count=$(nodes) $(args)

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is required: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo "Cannot create .venv. On Debian, install python3-venv."; exit 1; }

.venv/runtime: requirements.txt constraints.txt | .venv/bin/python
	$(PIP_INSTALL) -r requirements.txt
	@touch $@

.venv/dev: requirements-dev.txt requirements.txt constraints.txt | .venv/bin/python
	$(PIP_INSTALL) -r requirements-dev.txt
	@touch $@

.venv/hf: requirements-hf.txt .venv/dev | .venv/bin/python
	$(PIP_INSTALL) -r requirements-hf.txt
	@touch $@
