# Everything a user types. Each target builds the environment first, once.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PEERS := .venv-peers
LLAMA_CPP := .venv-llama-cpp
DEEPXDE := .venv-deepxde

.PHONY: help venv demo test browser lint serve peers peer-llama-cpp peer-deepxde peer-deepxde-torch clean

help:
	@echo "make demo    set up, serve the embedded model, let it solve held-out problems"
	@echo "make serve   serve the embedded model on 127.0.0.1:8000 (MODEL=FOLDER for another)"
	@echo "make test    the test suite        make lint   style, floors, types"
	@echo "make peers   a second environment with what the benchmarks compare against"
	@echo "make peer-llama-cpp   one more, with llama.cpp, compiled here (many minutes)"
	@echo "make peer-deepxde   one more, with DeepXDE on JAX; make peer-deepxde-torch adds PyTorch to it"
	@echo "make clean   remove environments, caches and work directories"

venv: $(STAMP)

# uv resolves and unpacks minutes faster than pip; where it cannot be had, pip does the same work.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt uv 2>/dev/null || true
	@if $(PY) -m uv --version >/dev/null 2>&1; then \
		$(PY) -m uv pip install --python $(PY) -c constraints.txt -e '.[dev]'; \
	else \
		$(PY) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	fi
	@touch $(STAMP)

demo: venv
	@$(PY) -m launch.demo

serve: venv
	@$(PY) -m launch.serve $(if $(MODEL),--model=$(MODEL))

# Two processes: most of the time goes into compiling small programs, which one core does at a time. What is tested in
# the first folders is what programs calculate, so XLA makes them there as it does for users; elsewhere its older
# emitters do, in half the time.
PYTEST := $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
CALCULATING := tests/kernels tests/models tests/engine
test: venv browser
	$(PYTEST) $(CALCULATING)
	XLA_FLAGS="$(XLA_FLAGS) --xla_cpu_use_fusion_emitters=false" $(PYTEST) tests $(CALCULATING:%=--ignore=%)

# The server's page is tested in a real browser. Where there is none and none can be installed, those tests are skipped and say so.
browser:
	@{ command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null || { \
		[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "installing chromium for the tests of the page" && \
		apt-get update -qq >/dev/null && apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	} || echo "no chromium: the tests of the page will be skipped"

lint: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports
	$(PY) -m mypy

peers: $(PEERS)/.installed

# pip alone: it honours a locally provided CPU build of torch.
$(PEERS)/.installed: constraints-peers.txt
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --disable-pip-version-check -r constraints-peers.txt
	@touch $@

peer-llama-cpp: $(LLAMA_CPP)/.installed

# Compiles llama.cpp from its source package: many minutes.
$(LLAMA_CPP)/.installed: constraints-peer-llama-cpp.txt
	@test -x $(LLAMA_CPP)/bin/python || $(PYTHON) -m venv $(LLAMA_CPP)
	$(LLAMA_CPP)/bin/python -m pip install --disable-pip-version-check -r constraints-peer-llama-cpp.txt
	@touch $@

peer-deepxde: $(DEEPXDE)/.installed

$(DEEPXDE)/.installed: constraints-peer-deepxde.txt
	@test -x $(DEEPXDE)/bin/python || $(PYTHON) -m venv $(DEEPXDE)
	$(DEEPXDE)/bin/python -m pip install --disable-pip-version-check -r constraints-peer-deepxde.txt
	@touch $@

# DeepXDE's L-BFGS lives in its PyTorch backend alone.
peer-deepxde-torch: peer-deepxde
	$(DEEPXDE)/bin/python -m pip install --disable-pip-version-check -c constraints-peers.txt torch

clean:
	rm -rf $(VENV) $(PEERS) $(LLAMA_CPP) $(DEEPXDE) build dist *.egg-info work .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
