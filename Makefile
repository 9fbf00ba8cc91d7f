# Every command sets up what it needs, in a virtual environment of its own.
#
#   make demo          trains a small language model on this machine
#   make test          the tests, on the newest JAX
#   make test-oldest   the tests, on the oldest JAX supported
#   make test-slow     those too long for every change
#   make check         formatting, lint and types

# The newest JAX needs Python 3.12; the oldest supported one runs on 3.11.
pick = $(firstword $(foreach p,$(1),$(shell $(p) -c 'import venv' 2>/dev/null && echo $(p))))
PYTHON ?= $(call pick,python3.12 python3.13 python3.11 python3)
OLDEST_PYTHON ?= $(call pick,python3.11 python3.12 python3.13 python3)
WORKERS ?= 2

.PHONY: demo test test-slow test-oldest check clean

# Large pages for large arrays: half the time in the kernel, on Linux (glibc).
demo: .venv/ready
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
	  .venv/bin/python -m scattermoe_jax.models.train

# A module's tests share what they compile, so one worker takes them all; the
# modules go in the order of tests/conftest.py.
PYTEST = -m pytest -rs -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: .venv/ready
	.venv/bin/python $(PYTEST)

test-slow: .venv/ready
	.venv/bin/python $(PYTEST) -m slow

test-oldest: .venv-oldest/ready
	.venv-oldest/bin/python $(PYTEST)

check: .venv/ready
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --upgrade pip
	.venv/bin/pip install --quiet --editable '.[dev]'
	touch $@

.venv-oldest/ready: pyproject.toml
	$(OLDEST_PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --upgrade pip
	.venv-oldest/bin/pip install --quiet --editable '.[test]' \
	  jax==0.7.2 jaxlib==0.7.2 flax==0.11.2
	touch $@

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info
