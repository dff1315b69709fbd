# Two commands set everything up: `make train` and `make test`. A stamp file says what is installed already.

PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet

.PHONY: train pretrained test bench clean

train: .venv/installed
	$(BIN)/python -m flexirl.train

# The policy that comes with the package, the mean of five seeds, made anew: less than two hours on two cores.
# Interrupted, it goes on where it stopped; outputs/pretrained holds what is done.
pretrained: $(foreach seed,0 1 2 3 4,outputs/pretrained/$(seed)/policy.onnx)
	$(BIN)/python -m flexirl.pretrained $(^D)

outputs/pretrained/%/policy.onnx: | .venv/installed
	$(BIN)/python -m flexirl.train mixture=general validation.members=132 total_steps=0 seed=$* \
		$(if $(wildcard outputs/pretrained/$*/lessons.npz),resume=outputs/pretrained/$*/policy.zip) \
		policies='[qoserve]' seeds=1 hydra.run.dir=outputs/pretrained/$*

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy flexirl
	$(BIN)/pytest -q -n 2 --dist loadfile

bench: .venv/installed
	$(BIN)/python -m flexirl.bench
	$(BIN)/python -m flexirl.bench startup
	$(BIN)/python -m flexirl.bench live

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# PyTorch first and pinned: left to a resolver, another version may come with gigabytes of libraries.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e .
	touch $@

.venv/installed-test: .venv/installed
	$(PIP) install -c constraints.txt -e '.[test]'
	touch $@
