# `make help` lists the commands; `make demo` and `make test` work on a fresh machine with Python 3.11 or newer.
# A command's help stands above it: its line, then how to use it.
PYTHON ?= python3
BIN := .venv/bin

# From the command line or config.env, and never from an environment that has such names for reasons of its own.
SETTINGS := IMAGE CACHE DATA WORKSPACE RESOURCE_GROUP COMPUTE AZURE_ROOT cmd in args exp port processes nodes build_args docker_args
$(foreach name,$(SETTINGS),$(eval $(name) :=))
IMAGE := pix2seq
CACHE := ~/.cache/huggingface
port := 8888
processes := 1
nodes := 1
odd := $(shell grep -nvE "^ *(\#.*)?$$|^ *($(subst $() ,|,$(SETTINGS)|PYTHON)) *=[^\"'\#$$]*$$" config.env 2> /dev/null | head -n 1)
$(if $(odd),$(error config.env:$(odd): must be NAME=VALUE, a setting without quotes, # or $$ in it))
-include config.env
unknown := $(filter-out PYTHON $(SETTINGS),$(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name))))
$(if $(unknown),$(error $(unknown): no such setting; make help cmd=NAME lists those of a command))
$(if $(filter-out docker,$(in)),$(error in=$(in): must be docker, or left out))
STAMP := $(shell date +%Y%m%d_%H%M%S)

# Each is expanded before the first line of a recipe runs: what is missing or wrong is told before any work.
program = $(if $(shell command -v $(1) 2> /dev/null),$(1),$(error $(1): not found; $(2)))
# The value of $(1), unless it fits one of the shell's patterns $(2); $(3) says what it must be.
checked = $(if $(shell case '$(subst ','\'',$(strip $($(1))))' in ($(2)) ;; (*) echo good ;; esac),$(strip $($(1))),$(error $(1)=$($(1)): must be $(3)))
number = $(call checked,$(1),""|0*|*[!0-9]*,a whole number from 1 on)
experiment = $(call checked,exp,""|template|[-_]*|*[!A-Za-z0-9_-]*,a word of letters and digits and - and _; not template)
new_exp = $(if $(wildcard experiments/$(experiment)),$(error exp=$(exp): experiments/$(exp) is there already),$(experiment))
recipe = $(or $(wildcard experiments/$(experiment)/recipe.yaml),$(error exp=$(exp): there is no experiments/$(exp)/recipe.yaml; make new-exp exp=NAME makes one))
setting = $(if $(strip $($(1))),'$(call checked,$(1),*" "*,one word)',$(error $(1): missing; set it in config.env, of which config.env.example is the model))
folder = $(abspath $(patsubst ~/%,$(HOME)/%,$(call checked,$(1),""|*" "*,a folder without spaces in its name)))
data = $(if $(wildcard $(call folder,DATA)/.),$(call folder,DATA),$(error DATA=$(DATA): no such folder))
committed = $(if $(STATUS),$(error job: sends what is committed, and nothing may be left to commit; git status says: $(STATUS)))

DOCKER = $(call program,docker,install Docker Engine and for GPUs NVIDIA's container toolkit)
BUILD = $(DOCKER) build --tag $(IMAGE) $(build_args) deploy/docker
# As the user who runs make, so that what a run writes is theirs; docker stop leaves the time to save. The keys are
# passed on if the environment has them.
CONTAINER = $(DOCKER) run --rm --init --ipc=host --stop-timeout=300 $(if $(shell command -v nvidia-smi 2> /dev/null),--gpus=all) \
	--user="$$(id -u):$$(id -g)" --env=USER=pix2seq --env=HOME=/tmp --env=HF_HOME=/cache --env=HF_TOKEN --env=WANDB_API_KEY \
	--volume="$(CURDIR):/workspace" --volume="$(call folder,CACHE):/cache" \
	$(if $(strip $(DATA)),--volume="$(data):/data:ro") $(docker_args)
TERMINAL = $$(test -t 0 && echo --interactive --tty)

COMMANDS := help demo test test-slow test-gpu lint format clean new-exp build-exp local jupyter terminal job
.PHONY: $(COMMANDS)

## help: this list, or how to use one of them
#      make help cmd=local
help:
ifneq ($(strip $(cmd)),)
	$(if $(filter-out $(COMMANDS),$(cmd))$(word 2,$(cmd)),$(error cmd=$(cmd): no such command; make help lists them))@awk \
		'/^## / { here = $$2 == "$(strip $(cmd)):" } /^[^#]/ { here = 0 } here { print substr($$0, 4) }' Makefile
else
	@awk '/^## / { name = $$2; sub(/^## [^ ]* /, ""); printf "%-11s%s\n", name, $$0 }' Makefile
endif

## demo: install, draw shapes, train, evaluate, picture
#  Takes about ten minutes on two cores; interrupted, it goes on where it was.
#      PYTHON     the interpreter .venv is made with (python3)
#      make demo PYTHON=python3.12
demo: .venv/runtime
	$(BIN)/python -m pix2seq.shapes data/shapes
	$(BIN)/python train.py --config configs/demo.yaml --root data/shapes --resume auto
	$(BIN)/python evaluate.py --checkpoint runs/demo/best --root data/shapes --output_dir runs/demo
	@echo "look at runs/demo/predictions.png (ground truth beside predictions) and runs/demo/samples/"
	@echo "next: $(BIN)/accelerate launch train.py --root /path/to/coco --project_name my-detector"

## test: install, run the fast tests
#      in         docker: in the container instead of .venv
#      args       words for pytest
#      make test args="tests/test_tokenizer.py -x"
#      make test in=docker
ifeq ($(in),docker)
test:
	$(BUILD)
	@mkdir -p "$(call folder,CACHE)"
	$(CONTAINER) $(IMAGE) python -m pytest $(args)
else
test: .venv/dev
	$(BIN)/python -m pytest $(args)
endif

## test-slow: the tests that take minutes: training to a given AP
#      make test-slow
test-slow: .venv/dev
	$(BIN)/python -m pytest -m slow

## test-gpu: what only a GPU can show
#      make test-gpu
test-gpu: .venv/dev
	$(BIN)/python -m pytest -m gpu

## lint: check the style
#      make lint
lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

## format: mend the style
#      make format
format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

## clean: remove .venv, and the copies that jobs were sent from
#      make clean
clean:
	rm -rf .venv build/jobs

## new-exp: a folder for an experiment: a recipe and notes
#      exp        its name: folder, run and job are called by it
#      make new-exp exp=bigger-canvas
new-exp:
	@mkdir experiments/$(new_exp)
	@for name in recipe.yaml notes.md; do \
		sed 's/NAME/$(experiment)/g' experiments/template/$$name > experiments/$(experiment)/$$name; done
	@echo "write experiments/$(experiment)/recipe.yaml and notes.md; then: make local exp=$(experiment) DATA=/path/to args=\"--root /data/coco\""

## build-exp: the Docker image: what the code needs, without the code
#      IMAGE      its name (pix2seq)
#      build_args more words for docker build
#      make build-exp build_args=--pull
build-exp:
	$(BUILD)

## local: train in the container
#  Builds the image first. The checkout is /workspace there, DATA is /data (read-only), CACHE keeps downloaded weights.
#  HF_TOKEN and WANDB_API_KEY are those of the environment. Ctrl-C and docker stop save; the same command goes on.
#      exp        an experiment, whose recipe is taken
#      args       words for train.py
#      processes  training processes, one for each GPU (1)
#      docker_args  more words for docker run
#      DATA  CACHE  folders, without spaces in their names; also in config.env
#      make local exp=bigger-canvas processes=8 DATA=/datasets args="--root /data/coco --mixed_precision bf16"
local:
	$(BUILD)
	@mkdir -p "$(call folder,CACHE)"
	$(CONTAINER) --env=PROCESSES=$(call number,processes) $(TERMINAL) $(IMAGE) deploy/torchrun.sh $(if $(exp),--config $(recipe)) $(args)

## jupyter: JupyterLab in the container
#  Its address, with the token, is printed; only this machine reaches it.
#      port       (8888)
#      docker_args  DATA  CACHE  as for make local
#      make jupyter port=9000
jupyter:
	$(BUILD)
	@mkdir -p "$(call folder,CACHE)"
	$(CONTAINER) --publish=127.0.0.1:$(call number,port):$(call number,port) $(TERMINAL) $(IMAGE) \
		jupyter lab --ip=0.0.0.0 --port=$(call number,port) --no-browser

## terminal: a shell in the container
#      docker_args  DATA  CACHE  as for make local
#      make terminal
#      make terminal docker_args=--publish=127.0.0.1:7860:7860
#  The second for the demo page, started in there: python -m pix2seq.demo --checkpoint runs/demo/best --host 0.0.0.0
terminal:
	$(BUILD)
	@mkdir -p "$(call folder,CACHE)"
	$(CONTAINER) --interactive --tty $(IMAGE) bash

## job: train an experiment on AzureML
#  Sends what is committed, and nothing else: a copy in build/jobs/, called as the job is, which stays until make clean.
#      exp        the experiment
#      nodes      how many, of eight GPUs each (1)
#      args       more of NAME=VALUE for az ml job create --set
#      WORKSPACE  RESOURCE_GROUP  COMPUTE  AZURE_ROOT   in config.env
#      make job exp=bigger-canvas nodes=2 args="distribution.process_count_per_instance=4"
job: SNAPSHOT = build/jobs/$(experiment)_$(STAMP)
job: STATUS = $(shell git status --porcelain 2>&1 | head -n 1)
job: AZ = $(call program,az,install the Azure CLI and its extension: az extension add --name ml)
job:
	$(committed)$(if $(wildcard $(SNAPSHOT)),$(error job: $(SNAPSHOT) was sent this very second; try again))@mkdir -p build/jobs
	@mkdir $(SNAPSHOT)
	git archive HEAD | tar -x -C $(SNAPSHOT)
	$(AZ) ml job create --file $(SNAPSHOT)/deploy/azureml/train.yaml \
		--resource-group $(call setting,RESOURCE_GROUP) --workspace-name $(call setting,WORKSPACE) \
		--set name=$(notdir $(SNAPSHOT)) compute=azureml:$(call setting,COMPUTE) \
		inputs.root.path=$(call setting,AZURE_ROOT) inputs.recipe=$(recipe) \
		resources.instance_count=$(call number,nodes) $(args)

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo "no virtual environment: on Debian, install python3-venv"; exit 1; }

.venv/runtime: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: requirements-dev.txt requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@
