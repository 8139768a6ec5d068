# Needs Python 3.11 or newer, pip and GNU make; everything else is installed into $(VENV).
#
#   PYTHON=python3.12         the interpreter of `demo`, `test` and `bench` (for a new environment)
#   NEWEST_PYTHON=python3.14  the interpreter of `test-newest`
#   PYTEST_ARGS="-k dense"    what to run, and how, instead of everything on every core

VENV ?= .venv
NEWEST_VENV ?= .venv-newest
PYTEST_ARGS ?= -n auto --maxprocesses 8

# Without a choice, `test` takes the oldest Python there is, and `test-newest` the newest.
PYTHON_CANDIDATES = $(if $(PYTHON),"$(PYTHON)",python3.11 python3.12 python3.13 python3.14 python3)
NEWEST_CANDIDATES = $(if $(NEWEST_PYTHON),"$(NEWEST_PYTHON)",python3.14 python3.13 python3 \
	"PYENV_VERSION=3.13.0 python3")

MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-newest lint lint-newest bench format clean check-newest-python

# $(call find-python,candidates,minor,variable): shell code that leaves in $$python the first
# candidate that runs and is Python 3.minor or newer, and fails when there is none.
define find-python
python=; \
for candidate in $(1); do \
	if env $$candidate -c 'import sys; sys.exit(sys.version_info < (3, $(2)))' >/dev/null 2>&1; \
	then python=$$candidate; break; fi; \
done; \
if [ -z "$$python" ]; then \
	echo >&2; \
	echo "*** NO PYTHON 3.$(2) OR NEWER WAS FOUND." >&2; \
	echo "*** Tried:" $(1) >&2; \
	echo "*** Install one, or name it: make $(3)=/path/to/python ..." >&2; \
	echo >&2; \
	exit 1; \
fi
endef

# $(call create-environment,directory,candidates,minor,variable). The stamp comes last, and an
# environment without one is made anew, so an interrupted creation leaves nothing half-made behind.
define create-environment
@$(call find-python,$(2),$(3),$(4)); \
echo "Creating $(1) with $$(env $$python --version)"; \
env $$python -m venv --clear $(1) && $(1)/bin/python -m pip --version >/dev/null || { \
	echo "*** Could not create $(1) with pip in it. Install your system's venv package" \
		"(python3-venv on Debian and Ubuntu), or set $(4) to another Python." >&2; \
	exit 1; \
}
@touch $@
endef

# $(call install,directory,extra)
define install
@echo "Installing backhand[$(2)] into $(1)"
@$(1)/bin/python -m pip install -q --disable-pip-version-check -e '.[$(2)]'
@touch $@
endef

# $(call run-lint,directory)
define run-lint
$(1)/bin/ruff check .
$(1)/bin/ruff format --check .
$(1)/bin/mypy
endef

# $(call run-tests,directory,options of pytest)
define run-tests
@$(1)/bin/python -c "import sys, jax; print('Python', sys.version.split()[0] + ', jax', jax.__version__)"
$(1)/bin/python -m pytest $(2) $(PYTEST_ARGS)
endef

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1 ~\2/p' $(firstword $(MAKEFILE_LIST)) \
		| awk -F '~' '{ printf "%-20s %s\n", $$1, $$2 }'

demo: $(VENV)/.ready-examples ## Train a network on handwritten digits, from nothing installed
	$(VENV)/bin/python examples/digits.py

test: lint ## Lint, types and tests on the oldest Python found
	$(call run-tests,$(VENV))

test-newest: lint-newest ## The same on the newest Python found (3.13 or newer)
	$(call run-tests,$(NEWEST_VENV),-m "not oldest_only")

lint: $(VENV)/.ready-test ## Lint and types alone
	$(call run-lint,$(VENV))

lint-newest: $(NEWEST_VENV)/.ready-test
	$(call run-lint,$(NEWEST_VENV))

bench: $(VENV)/.ready-bench ## Benchmarks against jax.grad and other libraries
	$(VENV)/bin/python -m benchmarks.foundation
	$(VENV)/bin/python -m benchmarks.accumulation
	$(VENV)/bin/python -m benchmarks.ops

format: $(VENV)/.ready-test ## Format the code and fix what lint can fix
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## Remove environments, caches and build outputs
	rm -rf $(VENV) $(NEWEST_VENV) build dist .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests examples notebooks benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	rm -rf __pycache__

# Fails when `test-newest` would find no Python to run on.
check-newest-python:
	@[ -e $(NEWEST_VENV)/.created ] || { $(call find-python,$(NEWEST_CANDIDATES),13,NEWEST_PYTHON); }

$(VENV)/.created:
	$(call create-environment,$(VENV),$(PYTHON_CANDIDATES),11,PYTHON)

$(NEWEST_VENV)/.created:
	$(call create-environment,$(NEWEST_VENV),$(NEWEST_CANDIDATES),13,NEWEST_PYTHON)

$(VENV)/.ready-%: $(VENV)/.created pyproject.toml
	$(call install,$(VENV),$*)

$(NEWEST_VENV)/.ready-%: $(NEWEST_VENV)/.created pyproject.toml
	$(call install,$(NEWEST_VENV),$*)
