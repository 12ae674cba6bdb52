# The commands of vae_dist. Each installs the environment first if needed. `make help` lists them.
#
#   CONFIG   a file of training options          make train CONFIG=configs/tutorial_2d.yaml
#   LAUNCH   where it runs                       make train LAUNCH=launch/cpu.yaml
#   RUN      a run's directory or a checkpoint   make eval RUN=runs/mine; several for make compare
#   ARGS     key=value options                   make train ARGS="model.latent_dim=20 name=mine"
#   DATA     the folder of MNIST for `make bench`, `gpu` and `notebooks`
#   WORKERS  how many processes share the tests
#   KILLS    how often `make chaos` kills
#   PYTHON   the Python of your own environment, with its own build of torch, instead of .venv

CONFIG ?=
LAUNCH ?= launch/one_process.yaml
RUN ?=
ARGS ?=
DATA ?= data
WORKERS ?= 2
KILLS ?= 20

# The environment is ready when this file is newer than the lock file.
ifdef PYTHON
READY :=
else
PYTHON := .venv/bin/python
READY := .venv/.ready
endif

.DEFAULT_GOAL := help
.PHONY: help train eval sample encode compare study report export pack fetch-weights runs test test-all \
	test-browser bench gpu chaos notebooks check format lock clean

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  make %-14s %s\n", $$1, $$2 }'
	@echo
	@sed -n 's/^#   /  /p' $(MAKEFILE_LIST)

train: $(READY) ## train a VAE (the tutorial's, unless CONFIG or ARGS say otherwise)
	$(PYTHON) -m accelerate.commands.accelerate_cli launch --quiet --config_file $(LAUNCH) vae_dist/train.py $(CONFIG) $(ARGS)

eval: $(READY) ## evaluate the newest run, or RUN, on the test images
	$(PYTHON) vae_dist/evaluate.py $(RUN) $(ARGS)

sample: $(READY) ## decode samples from the newest run, or from RUN
	$(PYTHON) vae_dist/sample.py $(RUN) $(ARGS)

encode: $(READY) ## write the latents of a data set to files, by the newest run or by RUN, over all processes
	$(PYTHON) -m accelerate.commands.accelerate_cli launch --quiet --config_file $(LAUNCH) vae_dist/encode.py $(RUN) $(ARGS)

compare: $(READY) ## compare runs: RUN="runs/mine runs/other"
	$(PYTHON) vae_dist/compare.py $(RUN) $(ARGS)

study: $(READY) ## train one VAE for each of 2, 5, 10, 20, 40 latents (or ARGS="KEY=V1,V2"), and compare them
	$(PYTHON) -m accelerate.commands.accelerate_cli launch --quiet --config_file $(LAUNCH) vae_dist/study.py $(CONFIG) $(ARGS)

report: $(READY) ## write a report of the newest run, or of RUN: one HTML file, no network
	$(PYTHON) vae_dist/report.py $(RUN) $(ARGS)

export: $(READY) ## export the newest run, or RUN, for others: weights, ONNX, a model card; ARGS="export.push=USER/NAME" uploads it
	$(PYTHON) vae_dist/export.py $(RUN) $(ARGS)

pack: $(READY) ## decode a folder of images once: ARGS="data.path=FOLDER"; a training does so by itself
	$(PYTHON) vae_dist/pack.py $(CONFIG) $(ARGS)

fetch-weights: $(READY) ## download the published weights of LPIPS and of FID's network; no other command does
	$(PYTHON) vae_dist/fetch_weights.py $(ARGS)

runs: $(READY) ## browse the runs' W&B records in the terminal, without an account; ARGS="runs_dir=FOLDER"
	$(PYTHON) $(dir $(lastword $(MAKEFILE_LIST)))vae_dist/browse.py $(CONFIG) $(ARGS)

test: $(READY) ## run the tests
	$(PYTHON) -m pytest -q -rs -n $(WORKERS) --dist worksteal -m "not slow and not browser" $(ARGS)

test-all: $(READY) ## run the tests, the slow ones included
	$(PYTHON) -m pytest -q -rs -n $(WORKERS) --dist worksteal $(ARGS)

test-browser: $(READY) ## run the report's tests in a browser; installs Debian's Chromium if that is allowed
	@tests/install_chromium.sh
	$(PYTHON) -m pytest -q -rs -m browser $(ARGS) tests/test_report.py

chaos: $(READY) ## kill real trainings at KILLS random moments, on 1 and on 3 processes; nothing may be lost
	$(PYTHON) tests/chaos.py --kills $(KILLS) $(ARGS)
	$(PYTHON) tests/chaos.py --images --kills $(KILLS) $(ARGS)
	$(PYTHON) tests/chaos.py --first-stage --kills $(KILLS) $(ARGS)

bench: $(READY) ## measure the speed against other loops (on MNIST in DATA), and on two processes
	$(PYTHON) tests/benchmarks/speed.py $(DATA)
	$(PYTHON) tests/benchmarks/distribution.py $(ARGS)

gpu: $(READY) ## on a machine with a GPU: test and measure the trainer, and write docs/gpu.md
	$(PYTHON) tests/gpu/report.py $(DATA) $(ARGS)

notebooks: $(READY) ## run the notebooks of docs/ (on MNIST in DATA) and keep their outputs; some minutes
	$(PYTHON) tests/notebooks.py $(DATA) $(ARGS)

check: $(READY) ## lint, formatting and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format: $(READY) ## format the code
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

lock: ## rewrite requirements.lock, within pyproject.toml's ranges and keeping versions that still fit
	python3 -m venv .venv-lock && .venv-lock/bin/pip install -q uv
	.venv-lock/bin/uv pip compile -q pyproject.toml --extra dev --universal --generate-hashes --no-annotate --no-header -o requirements.lock
	sed -i.bak '1i # Exact versions of all that .venv holds, with hashes. `make lock` writes this file from pyproject.toml.' requirements.lock
	rm -rf .venv-lock requirements.lock.bak

clean: ## remove the environment and the caches; runs and data stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build *.egg-info

.venv/.ready: requirements.lock
	python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@
