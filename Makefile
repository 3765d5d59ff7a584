# make setup: everything into .venv.   make demo: the whole job, 2 minutes.   make test: checks and tests, 30 minutes.
# make test-faults: every fault, half an hour.   make test-cluster: clusters launched for real, as root, 15 minutes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-faults test-cluster wheel check lock clean

setup: .venv/installed

# uv and not pip: pip can choose a torch build that torchvision's wheel does not load. The last line proves the pair.
# compat: a plain path entry; setuptools' import hook loses to any folder named segray in the current directory.
.venv/installed: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip sync --quiet --python $(BIN)/python requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable . --config-settings editable_mode=compat
	$(BIN)/python -c "import torch, torchvision.ops; print('torch', torch.__version__, 'torchvision', torchvision.__version__)"
	touch $@

demo: setup
	$(BIN)/segray demo

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check .venv-swift/installed
	$(BIN)/pytest -m "not slow"

# every fault of docs/reliability.md, on a real object store
test-faults: setup .venv-swift/installed
	$(BIN)/pytest tests/faults tests/training/tuning/test_tuning.py --durations=0

# cluster.yaml and clusters/onprem.yaml launched, on hosts that are network namespaces: Linux, and root, or all are skipped
test-cluster: setup .venv-swift/installed .venv-moto/installed
	tests/cluster/install.sh
	$(BIN)/pytest tests/cluster --durations=0

# into dist/, by way of a source archive: a folder build/ that lies about has no part in it
wheel: setup
	$(BIN)/uv build --quiet --out-dir dist

# The tests' object store has an environment of its own: its dependencies are not ours.
.venv-swift/installed: tests/faults/object_store.txt
	test -x .venv-swift/bin/python || $(PYTHON) -m venv .venv-swift
	.venv-swift/bin/python -m pip install --quiet --requirement tests/faults/object_store.txt
	touch $@

.venv-moto/installed: tests/cluster/moto.txt
	test -x .venv-moto/bin/python || $(PYTHON) -m venv .venv-moto
	.venv-moto/bin/python -m pip install --quiet --requirement tests/cluster/moto.txt
	touch $@

# after a change of dependencies in pyproject.toml; names no package index
lock:
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev --no-emit-index-url \
	  --custom-compile-command "make lock" --upgrade pyproject.toml --output-file requirements.txt

clean:
	rm -rf .venv .venv-swift .venv-moto build dist *.egg-info runs/demo
