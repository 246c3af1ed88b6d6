# Two commands do everything on a fresh machine: `make demo` and `make test`. Each makes .venv first if it is missing.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# pip would compile on one core, for half of its time; what does not compile is for newer versions of Python
PIP_INSTALL = $(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check --constraint constraints.txt
# three fifths of what is installed, and hardly imported: Python compiles of it what it needs
SELDOM := /(transformers/models|ray/(rllib|data|serve|train|tune|llm)|torch/(_inductor|onnx|testing)|tests?|sympy|pip|openai|fontTools|mypyc?|pygments|networkx|setuptools|graphql|werkzeug|fsspec)/

.PHONY: demo chat test quick journey hosts check clients install clean

demo: $(READY)
	@$(BIN)/pdserve demo

chat: $(READY)  # with SmolLM2, of 135 million parameters, which is downloaded first
	@$(BIN)/pdserve chat --model smollm2

test: $(READY)
	@PATH="$(abspath $(BIN)):$$PATH" scripts/check

quick: $(READY)  # the pure cores alone
	@PATH="$(abspath $(BIN)):$$PATH" scripts/quick

journey: $(READY)  # an operator's, from `ray up` to `ray down`, on four hosts of namespaces; takes root
	@PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=1 pytest -s -m journey tests/hosts/test_journey.py

hosts: $(READY)  # the journey, secured hosts, and hosts that differ or fail, each until the status says so; takes root
	@PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=1 pytest -s -m journey tests/hosts

clients:  # litellm, LangChain and lm-eval, for the tests that drive them
	@test -x .venv-clients/bin/python || $(PYTHON) -m venv .venv-clients
	@.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check --requirement tests/gateway/clients/requirements.txt

install: $(READY)

$(READY): pyproject.toml constraints.txt hatch_build.py $(wildcard kernels/native/*)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing pdserve and its dependencies into $(VENV) (a few minutes the first time)"
	@$(PIP_INSTALL) torch
	@$(PIP_INSTALL) --editable '.[dev]'
	@$(BIN)/python -m compileall -q -j 0 -x '$(SELDOM)' $(VENV)/lib > /dev/null || true
	@touch $@

clean:
	rm -rf $(VENV) build dist
