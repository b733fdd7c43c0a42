# make demo: from nothing to an answer.  make check: lint, types, layers, fast tests.  make test: the whole suite.
# make api: reference from the docstrings.  Windows: see README, "Without make".

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that share the tests. Much of a test's time is spent starting other processes.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadscope --no-loadscope-reorder
# What `make check` leaves out, by the markers of pyproject.toml.
FAST := not (slow or language or native or browser or network or gpu or npu)
DEMO := models/smollm2-135m-instruct-int8
export DO_NOT_TRACK = 1
export HF_HUB_DISABLE_TELEMETRY = 1
# The suite starts hundreds of processes; none of them should compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo check test lint tools api clean

# Installs again when the dependencies change. uv needs a minute, pip several.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version.split()[0] + "; choose another with: make PYTHON=python3.12 ...")'
	@if command -v uv >/dev/null; then \
		uv venv --quiet --seed --allow-existing --python $(PYTHON) $(VENV) && \
		uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]'; \
	else \
		$(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --progress-bar off -c constraints.txt -e '.[dev]'; \
	fi
	@touch $@

demo: $(VENV)/installed
	@$(BIN)/ov-afm export smollm2-135m-instruct --recipe int8 --output $(DEMO)
	@echo
	@echo "What is the capital of France?"
	@$(BIN)/ov-afm generate $(DEMO) "What is the capital of France?" --greedy --max-new-tokens 60
	@echo
	@echo "Next:"
	@echo "  $(BIN)/ov-afm export arcee-ai/AFM-4.5B --recipe int4 --output models/afm-4.5b-int4"
	@echo "  $(BIN)/ov-afm chat --ui $(DEMO)"
	@echo "  $(BIN)/ov-afm serve $(DEMO)"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy ov_afm
	$(BIN)/lint-imports --no-logo

check: lint
	$(PYTEST) -q -m "$(FAST)"

# What the suite needs from the system: a browser for the pages, a compiler for the kernels, objdump to look at them.
tools:
	@missing=""; \
	command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || missing="$$missing chromium"; \
	command -v g++ >/dev/null || command -v clang++ >/dev/null || missing="$$missing g++"; \
	command -v objdump >/dev/null || missing="$$missing binutils"; \
	if [ -n "$$missing" ]; then \
		if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
			echo "installing$$missing"; apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
		else \
			echo "missing:$$missing; tests that need them are skipped, with the reason. On Debian: sudo apt-get install$$missing"; \
		fi; \
	fi

test: tools lint
	$(PYTEST)

# `ov_afm` alone would be its public API; the packages add the rest.
api: $(VENV)/installed
	$(BIN)/pdoc --docformat google --output-directory build/api ov_afm ov_afm.errors ov_afm.presets ov_afm.pipeline \
		$(subst /,.,$(patsubst %/__init__.py,%,$(wildcard ov_afm/*/__init__.py)))
	@echo "open build/api/index.html"

clean:
	rm -rf $(VENV) .venv-* build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
