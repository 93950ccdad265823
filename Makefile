# Everything starts here. `make help` lists the targets.
# The environment is made and refreshed by make itself; only Python 3.11+ and make have to be there.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
STAMP  := $(VENV)/.installed
PY     := $(VENV)/bin/python
BENCHENV := .venv-bench
BENCH    := $(BENCHENV)/.installed
BENCHPY  := $(BENCHENV)/bin/python

PAPERS := $(shell ls -d paper_*/configs | sed -nE 's|^paper_([A-Za-z0-9_]+)/configs$$|\1|p')
ON     ?= digits
SEEDS  ?= 0 1 2
ARGS   ?=

# Without OMP_NUM_THREADS, which nproc obeys.
CORES  := $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || sysctl -n hw.ncpu)
# make -jN makes N rows at a time; make -n prints the plan.
FLAGS  := $(filter-out --%,$(firstword -$(MAKEFLAGS)))
JOBS   ?= $(patsubst -j%,%,$(filter -j%,$(MAKEFLAGS)))
ROWS    = $(PY) -m common.cli.rows paper_$* --on "$(ON)" --seeds "$(SEEDS)"

##@ Results
reproduce: $(addprefix reproduce-,$(PAPERS)) ## all papers on the embedded digits

reproduce-%: $(STAMP) ## rows, table and figures of a paper [ON=stems] [SEEDS="0 1 2"] [ARGS=...] [-j2]
	+@[ -x "$(PY)" ] || { echo "make setup comes first"; exit 0; }; \
	$(if $(findstring n,$(FLAGS)),$(ROWS) --plan -- $(ARGS),failed=0; \
	$(ROWS) --jobs "$(JOBS)" -- $(ARGS) || failed=$$?; [ $$failed -le 1 ] || exit $$failed; \
	[ ! -f paper_$*/analysis.py ] || \
	$(PY) -m paper_$*.analysis --on "$(ON)" --seeds $(SEEDS) || failed=1; \
	$(PY) -m common.results.tables paper_$* --on "$(ON)" --seeds "$(SEEDS)"; exit $$failed)

commands-%: $(STAMP) ## one command per row, for a cluster [ON=] [SEEDS=] [ARGS=]
	@$(ROWS) --commands -- $(ARGS)

results: $(STAMP) ## render all tables again from the result files
	@$(PY) -m common.results.tables $(addprefix paper_,$(PAPERS))

bench: $(BENCH) ## ours against peers and the bare loop, under half an hour [ARGS="training --compile"]
	OMP_NUM_THREADS=1 $(BENCHPY) -m benchmarks $(ARGS)

bench-full: $(BENCH) ## the same with more rounds, sizes and examples, an hour or two
	OMP_NUM_THREADS=1 $(BENCHPY) -m benchmarks --full --compile $(ARGS)

tensorboard: $(STAMP) ## look at all runs
	$(VENV)/bin/tensorboard --logdir runs

new: $(STAMP) ## the skeleton of another paper, which passes make check test [PAPER=name]
	@$(PY) -m common.cli.new "$(PAPER)"
	@$(PY) -m common.results.tables "paper_$(PAPER)" > /dev/null

##@ Quality
check: $(STAMP) ## format, lint, types, direction of imports
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

format: $(STAMP) ## format the code and fix what the linter can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

test: $(STAMP) ## fast tests, some minutes
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(CORES)

test-wheel: $(STAMP) ## build the wheel and use it without the checkout, a minute
	@.ci/wheel $(PY)

test-slow: $(STAMP) ## all tests but those of test-faults
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(CORES) -m "not gpu and not faults"

test-faults: $(STAMP) ## kills, full disks, lost ranks, 1/2/3 processes, several nodes: some 20 minutes
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(CORES) -m faults

##@ Set-up
setup: $(STAMP) ## make or refresh the environment in .venv

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	  "Python 3.11 or newer is needed, found " + sys.version.split()[0] + "; set PYTHON=/path/to/python3.11")'
	@echo "installing into $(VENV): about 5 GB, some minutes"
	@rm -f $@
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

# Peers that would disturb the environment get one of their own, which sees the other's packages. A
# peer that cannot be installed is a line of the report.
$(BENCH): $(STAMP)
	@rm -rf $(BENCHENV); $(PYTHON) -m venv $(BENCHENV)
	@$(PY) -c 'import site; print(site.getsitepackages()[0])' > $$(echo $(BENCHENV)/lib/python3*/site-packages)/main.pth
	@$(BENCHPY) -m pip install --quiet --disable-pip-version-check --no-deps \
	  "adversarial-robustness-toolbox>=1.20.1" six tqdm || echo "adversarial-robustness-toolbox is not there"
	@touch $@

clean: ## remove the environment and caches; runs and results stay
	rm -rf $(VENV) $(BENCHENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info build

help: ## this list
	@awk 'BEGIN {FS = ":.*## "} /^##@ / {printf "\n%s\n", substr($$0, 5)} \
	  /^[a-z%-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: new reproduce results bench bench-full tensorboard check format test test-wheel test-slow test-faults setup clean \
  help
