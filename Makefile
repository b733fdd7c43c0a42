# make demo: from nothing to an answer.  make test: the whole suite.  Windows: see README, "Without make".

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that share the tests; much of a test's time is another process's start.
WORKERS ?= 2
DEMO := models/smollm2-135m-instruct-int8
export DO_NOT_TRACK = 1
export HF_HUB_DISABLE_TELEMETRY = 1
# Hundreds of processes start in the suite; none shall compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint tools clean

# Installing again is needed when the dependencies change; uv does it in a minute, pip in several.
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
	@echo "To go on:"
	@echo "  $(BIN)/ov-afm export arcee-ai/AFM-4.5B --recipe int4 --output models/afm-4.5b-int4"
	@echo "  $(BIN)/ov-afm chat --ui $(DEMO)"
	@echo "  $(BIN)/ov-afm serve $(DEMO)"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy ov_afm

# What the suite needs from the system: a browser for the report's page, a compiler for the kernels.
tools:
	@missing=""; \
	command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || missing="$$missing chromium"; \
	command -v g++ >/dev/null || command -v clang++ >/dev/null || missing="$$missing g++"; \
	if [ -n "$$missing" ]; then \
		if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
			echo "installing$$missing"; apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
		else \
			echo "not here:$$missing; the tests that need them are skipped and say so. On Debian: sudo apt-get install$$missing"; \
		fi; \
	fi

test: tools lint
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadscope --no-loadscope-reorder

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
