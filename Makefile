# Each target does its own set-up: a virtual environment in .venv, everything by package name.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := $(VENV)/.demo
# A file of exact versions, which .ci/run gives; added to the constraints that pip is configured with.
CONSTRAINTS ?=
POOL ?=
SAMPLES ?= 20000
# Tests of `make check`: of code that needs no training, no encoder and no command line.
UNIT := $(wildcard $(addprefix tests/,catalog demo kernels plan recipes shards sources storage)) \
	$(addprefix tests/test_,dependencies.py docs.py layers.py reference.py spelling.py text.py)

.PHONY: check demo test soak lint bench docs clean

# What to run before a commit: a minute and a half on two processors.
check: lint
	$(BIN)/pytest $(UNIT) -m "not slow" -q -n auto --dist worksteal

# make demo POOL="shards/ embeddings/" runs it on a pool of your own.
demo: $(DEMO)
	$(BIN)/tailwise demo $(if $(POOL),$(POOL) --samples $(SAMPLES))

# A process more than there are processors, since tests also wait. tests/conftest.py deals out whole files, the longest first.
test: $(READY)
	$(BIN)/pytest -n $$(($$(getconf _NPROCESSORS_ONLN) + 1))

# Kills, full disks, damage and odd input, ten times as much as `make test` tries; prints the figures of docs/reliability/index.md.
soak: $(READY)
	rm -f soak.jsonl
	TAILWISE_SOAK=1 TAILWISE_SOAK_LOG=$(CURDIR)/soak.jsonl $(BIN)/pytest tests/soak tests/execution/test_ray.py tests/end_to_end/test_clients.py -n auto --dist worksteal
	$(BIN)/python tests/soak/figures.py soak.jsonl

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The documentation as a site. --strict fails on broken links; tests/test_docs.py on pages outside the navigation.
docs: $(READY)
	$(BIN)/zensical build --clean --strict
	! grep -rlE '<(script|link|img|iframe)[^>]*(src|href)="?(https?:)?//' site --include='*.html' # nothing is fetched from outside

# Not those that need a data set, a folder, a Ray cluster, or two versions to compare.
bench: $(READY)
	for script in $(filter-out %/lite0.py %/ray_nodes.py %/ray_bytes.py %/compare_installations.py %/pairs.py %/out_of_core.py %/report.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS:%=--constraint %) --editable '.[dev]'
	touch $(READY)

$(DEMO): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS:%=--constraint %) --editable '.[demo]'
	touch $(DEMO)

clean:
	rm -rf demo demo-pool $(VENV) site .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
