# Needs Python and a C++ compiler (Inductor compiles with it). Each target makes .venv first if it
# is absent or older than the files that describe it; otherwise nothing touches the network.

PYTHON ?= python3
# Processes that run tests side by side; a file runs in one, so that it makes what it shares once.
JOBS ?= 2
PYTEST = .venv/bin/python -m pytest -n $(JOBS) --dist loadfile

.PHONY: test check demo docs lint types format clean

test: lint types docs  ## everything, what .ci/run calls; names the tests that take longest
	$(PYTEST) --durations=80 --durations-min=5

check: lint types  ## the quick part
	$(PYTEST) -m "not slow"

demo: .venv/.installed  ## train a small language model three ways and plot the comparison
	.venv/bin/python examples/distill_language_model.py

# A warning is an error (mkdocs.yml), but not with -q, which hides it. The variable silences the
# theme's notice about MkDocs 2.
docs: .venv/.installed  ## the guide as a site, in site/
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build

lint: .venv/.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: .venv/.installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# mypy follows neither the import hook of an editable install nor the package's __path__, so it
# would miss fxdistill.passes. It follows links: build/types/fxdistill is the package as the wheel
# has it, and the paths in messages are those of the checkout, but for the fxdistill/ before passes/.
types: .venv/.installed
	rm -rf build/types
	mkdir -p build/types/fxdistill
	ln -s "$(CURDIR)"/fxdistill/* "$(CURDIR)/passes" build/types/fxdistill/
	cd build/types && ../../.venv/bin/mypy --config-file ../../pyproject.toml \
	  --cache-dir ../../.mypy_cache -p fxdistill

# torch comes first and alone: with the version pinned, pip takes a CPU build where it is offered
# one. setuptools comes with it, so that the editable install needs no build environment.
.venv/.installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -c constraints.txt torch setuptools
	.venv/bin/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist runs site *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
