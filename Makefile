# The README's two commands: `make train` and `make test`. Each makes .venv on first use and reuses it afterwards.
PYTHON ?= python3
VENV   ?= .venv
RUN     = $(VENV)/bin/longfire

.PHONY: train test test-all lint house bench story reference docs triton null-gpu null-gpu-table null-gpu-check newest-torch install clean

train: install                       ## real text -> tokenizer -> model -> evaluation -> Hugging Face weights -> report
	$(RUN) train recipes/quickstart.toml

test: install                        ## every promise, in at most 12 minutes of CPU time
	$(VENV)/bin/python -m pytest -m "not slow and not matrix" -n 2 --durations 20

test-all: install                    ## all cases of every promise, random kills, live comparisons, every order of a pipeline
	$(VENV)/bin/python -m pytest -n 2 --durations 20

lint: install                        ## the linter, the formatter and the type checker
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

house: install                       ## how readable the package is, in numbers, beside ceilings and goals
	PYTHONPATH=tests/house $(VENV)/bin/python tests/house/measures.py

bench: install                       ## every claim of speed or memory, measured beside its peer
	for script in $(filter-out bench/measure.py bench/tables.py,$(wildcard bench/*.py)); do $(VENV)/bin/python $$script || exit 1; done; $(VENV)/bin/python bench/tables.py

story: install                       ## the life of a model, one command a line
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" bash scripts/story.sh

reference: install                   ## the pages of docs/ that are made from the code
	$(VENV)/bin/python scripts/reference.py

docs: $(VENV)/.docs                  ## the documentation site, in site/; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

$(VENV)/.docs: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

triton: install                      ## our Triton kernels in Triton's interpreter, on the CPU
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --no-deps triton
	TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest tests/triton_interpreter

# The oldest torch that is supported is that of constraints.txt; this is the newest. It is a CUDA build, so both kinds of tests run.
NEWEST_TORCH  ?= 2.14.1
NEWEST         = .newest-torch

newest-torch: $(NEWEST)/venv/.installed    ## make test and make null-gpu with the newest torch that is supported
	$(NEWEST)/venv/bin/python -m pytest -m "not slow and not matrix" -n 2
	PYTHONPATH=$(CURDIR) $(NEWEST)/venv/bin/python tests/null_gpu/start.py $(NEWEST) -m pytest tests/null_gpu

$(NEWEST)/venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(NEWEST)/venv
	grep -v '^torch==\|^triton==' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/venv/bin/python -m pip install --quiet --constraint $(NEWEST)/constraints.txt torch==$(NEWEST_TORCH)
	$(NEWEST)/venv/bin/python -m pip install --quiet --constraint $(NEWEST)/constraints.txt --editable '.[dev,cuda]'
	touch $@

# A stand-in for a GPU (tests/null_gpu/README.md): torch with CUDA, in an environment of its own.
NULL_GPU   ?= .null-gpu
NULL_START  = PYTHONPATH=$(CURDIR) $(NULL_GPU)/venv/bin/python tests/null_gpu/start.py $(NULL_GPU)

null-gpu: $(NULL_GPU)/venv/.installed      ## the host code of CUDA without a GPU: crashes, graphs, waits, memory
	$(NULL_START) -m pytest tests/null_gpu

null-gpu-table: $(NULL_GPU)/venv/.installed
	$(NULL_START) tests/null_gpu/recipe_memory.py docs/gpu.md

null-gpu-check: $(NULL_GPU)/venv/.installed
	$(NULL_START) tests/null_gpu/gpu_check.py $(NULL_GPU)/gpu-check.jsonl

$(NULL_GPU)/venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(NULL_GPU)/venv
	$(NULL_GPU)/venv/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(NULL_GPU)/venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,cuda]'
	touch $@

install: $(VENV)/.installed

# torch comes first and alone: where constraints name a CPU build, nothing may pull another one.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
