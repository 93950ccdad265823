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

PAPERS := $(patsubst paper_%/configs,%,$(wildcard paper_*/configs))
ON     ?= digits
SEEDS  ?= 0 1 2
ARGS   ?=
PAPER  ?=
CORES  := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)

# The embedded digits train one row per core; rows on real data are left to run one by one.
ifneq ($(filter digits%,$(ON)),)
JOBS ?= $(CORES)
export OMP_NUM_THREADS ?= 1
else
JOBS ?= 1
endif

##@ Results
reproduce: $(addprefix reproduce-,$(PAPERS)) ## all papers on the embedded digits

reproduce-%: $(STAMP) ## rows, table and figures of a paper [ON=stem-prefix] [SEEDS="0 1 2"] [ARGS=...] [-j2]
	@rm -f runs/.failed-$*
	@$(MAKE) --no-print-directory -k $(if $(filter -j%,$(MAKEFLAGS)),,-j$(JOBS)) PAPER=$* rows \
	  || { mkdir -p runs; touch runs/.failed-$*; }
	@mkdir -p paper_$*/results; for stem in runs/paper_$*/$(ON)*; do for seed in $(SEEDS); do \
	  run=$$stem/seed$$seed; to=paper_$*/results/$${stem##*/}-seed$$seed.json; \
	  if [ -e $$run/finished ]; then cp $$run/results.json $$to.tmp; mv $$to.tmp $$to; fi; done; done
	@$(PY) -m paper_$*.analysis --on $(ON) --seeds $(SEEDS) || touch runs/.failed-$*
	@$(PY) -m common.tables paper_$* --on $(ON) --seeds "$(SEEDS)"
	@if [ -e runs/.failed-$* ]; then echo "some rows of paper_$* failed, see FAILED above;" \
	  "the same command tries them again"; exit 1; fi

commands-%: $(STAMP) ## one command per row, for a cluster [ON=] [SEEDS=] [ARGS=]
	@$(MAKE) --no-print-directory -s PAPER=$* commands

results: $(STAMP) ## render all tables again from the result files
	@$(PY) -m common.tables $(addprefix paper_,$(PAPERS))

bench: $(BENCH) ## ours against peers and the bare loop, under half an hour [ARGS="training --compile"]
	OMP_NUM_THREADS=1 $(BENCHPY) -m benchmarks $(ARGS)

bench-full: $(BENCH) ## the same with more rounds, sizes and examples, an hour or two
	OMP_NUM_THREADS=1 $(BENCHPY) -m benchmarks --full --compile $(ARGS)

tensorboard: $(STAMP) ## look at all runs
	$(VENV)/bin/tensorboard --logdir runs

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

.PHONY: reproduce results bench bench-full tensorboard check format test test-slow test-faults setup clean \
  help rows commands

# ---- the experiment graph: one node per config and seed, made by the sub-make of reproduce-% --------
ifneq ($(PAPER),)
CONFIGS := paper_$(PAPER)/configs
STEMS   := $(basename $(notdir $(wildcard $(CONFIGS)/$(ON)*.yaml)))
ifeq ($(STEMS),)
$(error no config in $(CONFIGS) begins with ON=$(ON); there are: $(basename $(notdir $(wildcard $(CONFIGS)/*.yaml))))
endif
ALL     := $(basename $(notdir $(wildcard $(CONFIGS)/*.yaml)))
row      = runs/paper_$(PAPER)/$(1)/seed$(2)/finished
# What a config refers to by path decides its row too.
parts    = $(shell sed -nE 's|^[a-z]+: *([^ {]+\.yaml).*|$(CONFIGS)/\1|p' $(CONFIGS)/$(1).yaml)
# A row that starts from the weights of another, or learns from it, waits for that one.
needs    = $(filter $(ALL),$(shell sed -n 's/.*experiment: *\([A-Za-z0-9_]*\).*/\1/p' $(CONFIGS)/$(1).yaml))

# A row made with other ARGS is made again.
given    = x$(strip $(ARGS))
before   = x$(strip $(file <$(dir $(call row,$(1),$(2)))args))
changed  = $(if $(subst $(given),,$(before))$(subst $(before),,$(given)),FORCE)
FORCE:
.PHONY: FORCE

rows: $(foreach stem,$(STEMS),$(foreach seed,$(SEEDS),$(call row,$(stem),$(seed))))

# Every command makes its row, and first the rows that this one starts from.
commands:
	@$(foreach stem,$(STEMS),$(foreach seed,$(SEEDS),printf '%s\n' "make -C $(CURDIR) PAPER=$(PAPER) ON=$(stem) SEEDS=$(seed) ARGS='$(strip $(ARGS))' $(call row,$(stem),$(seed))";))true

define ROW
$(call row,$(1),$(2)): $(CONFIGS)/$(1).yaml $(call parts,$(1)) $(foreach n,$(call needs,$(1)),$(call row,$(n),$(2))) $(if $(wildcard $(call row,$(1),$(2))),$(call changed,$(1),$(2))) | $(STAMP)
	@rm -f $$@; mkdir -p $$(@D); printf '%s' '$(strip $(ARGS))' > $$(@D)/args; echo "begin  $(1) seed $(2)"; begun=$$$$SECONDS; \
	if $(PY) -m paper_$(PAPER) reproduce --config $(CONFIGS)/$(1).yaml --seed_everything $(2) \
	  --trainer.enable_progress_bar false $(ARGS) > $$(@D)/log.txt 2>&1; \
	then touch $$@; echo "end    $(1) seed $(2)  ($$$$((SECONDS - begun)) s)"; \
	else echo "FAILED $(1) seed $(2), whole log in $$(@D)/log.txt: $$$$(tail -n 1 $$(@D)/log.txt)"; exit 1; fi

endef
$(foreach stem,$(ALL),$(foreach seed,$(SEEDS),$(eval $(call ROW,$(stem),$(seed)))))
endif
