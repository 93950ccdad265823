# Everything starts here. `make help` lists the targets.
# The environment is made and refreshed by make itself; only Python 3.11+ and GNU make have to be
# there. Version 3.81, that of macOS, is enough: it has neither .ONESHELL nor .SHELLFLAGS, so a
# recipe has one command a line.

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
# One target at a time: -j is about rows.
.NOTPARALLEL:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
STAMP  := $(VENV)/.installed
PY     := $(VENV)/bin/python
BENCHENV := .venv-bench
BENCH    := $(BENCHENV)/.installed
BENCHPY  := $(BENCHENV)/bin/python
OLDENV   := .venv-oldest
OLDEST   := $(OLDENV)/.installed
INDEX    := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
PIP      := -m pip install --quiet --disable-pip-version-check $(INDEX)
SIZE     := $(if $(TORCH_INDEX),,: about 5 GB; TORCH_INDEX=https://download.pytorch.org/whl/cpu for less)

PAPERS := $(shell ls -d paper_*/configs | sed -nE 's|^paper_([A-Za-z0-9_]+)/configs$$|\1|p')
NAMES  := $(PAPERS) robustness# the second is benchmarks/robustness
ON     ?= digits
SEEDS  ?= 0 1 2
ARGS   ?=

# One thread a process. Compiled tests are always kept: compiling takes 6 s a process.
ALONE  := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=
# -jN makes N rows at a time; make 3.81 does not tell recipes what N is, JOBS=N does in all versions.
JOBS   ?= $(patsubst -j%,%,$(filter -j%,$(MFLAGS)))
PACKAGE = $(if $(filter robustness,$*),benchmarks.robustness,paper_$*)
CHOSEN  = $(PACKAGE) --on "$(ON)" --seeds "$(SEEDS)"
PLAN    = $(PY) -m common.cli.rows $(CHOSEN) --jobs "$(JOBS)" --plan -- $(ARGS)
# Whether make only prints commands (-n): it prints the plan too.
DRY     = $(findstring n,$(filter-out --%,$(firstword -$(MAKEFLAGS))))

# NAME stands for a paper in the list of targets. By exec a signal to make reaches what it runs.
##@ First
# reproduce-NAME: ## train and attack a paper's networks: tables and figures in runs/
$(NAMES:%=reproduce-%): reproduce-%: $(STAMP)
	$(if $(DRY),+@! command -v $(PY) > /dev/null || $(PLAN))
	@exec $(PY) -m common.cli.rows $(CHOSEN) --jobs "$(JOBS)" --report -- $(ARGS)

# plan-NAME: ## the rows that reproduce-NAME would make
$(NAMES:%=plan-%): plan-%: $(STAMP)
	@$(PLAN)

test: $(STAMP) ## fast tests, some minutes
	$(ALONE) $(PY) -m pytest -n auto

help: ## this list
	@awk 'BEGIN {FS = ":.*## "} /^##@ / {printf "\n%s\n", substr($$0, 5)} \
	  /^(# )?[A-Za-z-]+:.*## / {sub(/^# /, ""); printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo 'NAME is $(NAMES)'
	@echo 'ON="digits"                      rows: exact names, patterns with *, beginnings of names'
	@echo 'SEEDS="0 1 2"                    their seeds'
	@echo 'ARGS="--trainer.max_epochs 3"    options of every row'
	@echo 'JOBS=2                           rows at a time; by default one, or one per core on a CPU'

##@ Results
reproduce: $(NAMES:%=reproduce-%) ## all papers, and the comparison of their methods

robustness: reproduce-robustness ## all methods in one network, under one protocol; 15 to 30 minutes on two cores

# publish-NAME: ## finished rows become the published results in paper_NAME and its README
$(NAMES:%=publish-%): publish-%: $(STAMP)
	@$(PY) -m common.cli.publish $(CHOSEN)

# commands-NAME: ## one command per row, for a cluster
$(NAMES:%=commands-%): commands-%: $(STAMP)
	@$(PY) -m common.cli.rows $(CHOSEN) --commands -- $(ARGS)

reproduce-% plan-% publish-% commands-%:
	$(error there is no paper '$*' here; there are $(NAMES))

results: $(STAMP) ## render the tables of all READMEs again from the published results
	@$(PY) -m common.results.tables $(addprefix paper_,$(PAPERS)) benchmarks.robustness

report: $(STAMP) ## one page with all published results: report/index.html
	@$(PY) -m common.page $(addprefix paper_,$(PAPERS))

bench: $(BENCH) ## ours against peers and the bare loop, under half an hour [ARGS="training --compile"]
	OMP_NUM_THREADS=1 $(BENCHPY) -m benchmarks $(ARGS)

bench-full: $(BENCH) ## the same with more rounds, sizes and examples, an hour or two
	OMP_NUM_THREADS=1 $(BENCHPY) -m benchmarks --full $(ARGS)

# PY=python3 uses the packages of that one: without a network nothing can be installed.
gpu: $(if $(filter command,$(origin PY)),,$(STAMP)) ## all that is measured on a GPU, 25 minutes; continues [PY=python3 ARGS="--minutes 10"]
	@exec $(PY) -m benchmarks.gpu $(ARGS)

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

test-wheel: $(STAMP) ## build the wheel and use it without the checkout, a minute
	@.ci/wheel $(PY)

test-slow: $(STAMP) ## all tests but those of test-faults
	$(ALONE) $(PY) -m pytest -n auto -m "not gpu and not faults"

test-faults: $(STAMP) ## kills, full disks, lost ranks, 1/2/3 processes, several nodes: some 20 minutes
	$(ALONE) $(PY) -m pytest -n auto -m faults

test-oldest: $(OLDEST) ## fast tests with the lowest versions that pyproject.toml allows
	$(ALONE) $(OLDENV)/bin/python -m pytest -n auto

##@ Set-up
setup: $(STAMP) ## make or refresh the environment in .venv [TORCH_INDEX=index of wheels for the CPU]

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	  "Python 3.11 or newer is needed, found " + sys.version.split()[0] + "; set PYTHON=/path/to/python3.11")'
	@echo "installing into $(VENV), some minutes$(SIZE)"
	@rm -f $@
	@$(PYTHON) -m venv $(VENV)
	@$(PY) $(PIP) -c constraints.txt -e ".[dev]"
	@touch $@

$(OLDEST): pyproject.toml tests/oldest.py
	@echo "installing the lowest versions into $(OLDENV), some minutes$(SIZE)"
	@rm -rf $(OLDENV)
	@$(PYTHON) -m venv $(OLDENV)
	@$(PYTHON) tests/oldest.py > $(OLDENV)/constraints.txt
	@$(OLDENV)/bin/python $(PIP) -c $(OLDENV)/constraints.txt -e ".[test]"
	@touch $@

# Peers that would disturb the environment get one of their own, which sees the other's packages. A
# peer that cannot be installed is a line of the report.
$(BENCH): $(STAMP)
	@rm -rf $(BENCHENV); $(PYTHON) -m venv $(BENCHENV)
	@$(PY) -c 'import site; print(site.getsitepackages()[0])' > $$(echo $(BENCHENV)/lib/python3*/site-packages)/main.pth
	@for peer in "adversarial-robustness-toolbox==1.20.1 six tqdm" torchattacks==3.3.0; do \
	  $(BENCHPY) $(PIP) --no-deps $$peer || echo "$$peer: not installed"; done
	@touch $@

clean: ## remove the environment and caches; runs and results stay
	rm -rf $(VENV) $(BENCHENV) $(OLDENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info build

.PHONY: help test reproduce robustness results report bench bench-full gpu tensorboard new check format \
  test-wheel test-slow test-faults test-oldest setup clean $(foreach do,reproduce plan publish commands,$(NAMES:%=$(do)-%))
