# make demo: raw text → a model that answers.   make test: the tests.   Both set themselves up in .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
OUT    ?= runs/demo
JOBS   ?= 2

.PHONY: demo test test-all check format clean

demo: $(VENV)/.demo
	$(BIN)/luban demo --out $(OUT) $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow" $(ARGS)

test-all: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow" tests/unit

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# One stamp a set of extras, so that a second call costs nothing. Torch is asked for first and by its exact
# version: a range could resolve to a build several gigabytes larger.
$(VENV)/.base: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Luban needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}: make PYTHON=python3.12 demo")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) (once, a minute or two)"
	$(PIP) "$$(grep '^torch==' constraints.txt)" 'setuptools>=77'
	@touch $@

$(VENV)/.demo: $(VENV)/.base
	$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) --editable '.[all,test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) --editable '.[all,test,dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
