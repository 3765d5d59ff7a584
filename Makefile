# make setup installs everything into .venv. make demo trains on drawn shapes and segments them. CONTRIBUTING.md describes the
# test targets.
PYTHON ?= python3
BIN := .venv/bin
# Where it is set, every process compiles every module it imports: 20 s for a training worker instead of 10 s.
unexport PYTHONDONTWRITEBYTECODE
# Tests of one file run in one process and share its fixtures; tests/conftest.py puts the longest files first.
PARALLEL := --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup demo docs encoders test test-all test-faults test-cluster gpu-pack gpu-run wheel check lock clean

setup: .venv/installed

# uv instead of pip, because pip can choose a torch build that torchvision's wheel cannot load. The import of both checks it.
# editable_mode=compat adds a plain path entry; setuptools' default, an import hook, is shadowed by any folder named segray in
# the current directory.
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

# Linters, types, tests that need neither Ray nor an object store, and smoke tests on a real Ray.
test: check
	$(BIN)/pytest $(PARALLEL) -m "smoke or not (integration or slow or gpu)"

# `make test`, and every other test except the slow faults and the clusters; and the documentation site.
test-all: test docs .venv-swift/installed
	$(BIN)/pytest $(PARALLEL) --ignore tests/cluster --ignore tests/test_jobs.py -m "(integration or gpu) and not (smoke or slow)" --durations=30

# The faults of docs/guides/faults.md that `make test-all` does not inject, and its other slow tests.
test-faults: setup .venv-swift/installed .venv-azurite/installed
	$(BIN)/pytest $(PARALLEL) --ignore tests/cluster -m slow --durations=0

# cluster.yaml and clusters/onprem.yaml launched, on hosts that are network namespaces: Linux, and root, or all are skipped
test-cluster: setup .venv-swift/installed .venv-moto/installed
	tests/cluster/install.sh
	$(BIN)/pytest $(PARALLEL) tests/cluster tests/test_jobs.py --durations=0

# Packs the packages that `make gpu-run` needs on a machine with a GPU but without a network into gpu-pack/ (40 MiB). GPU_PYTHON
# is the Python version of that machine; the default is 3.12.
gpu-pack:
	benchmarks/pack_gpu.sh

# On that machine, run everything that needs a GPU, within 10 minutes and without `make setup`; writes runs/gpu_run.json.
gpu-run:
	@$(PYTHON) benchmarks/gpu_run.py $(if $(OUT),--output $(OUT)/gpu_run.json)

# The documentation site, into site/. A broken link or anchor is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir site

# The table of timm's encoders in the documentation, measured on the smallest member of each family; takes half an hour.
encoders: setup
	$(BIN)/python -m tests.models.timm_families

# Into dist/. uv builds the wheel from a source archive, so files left over in build/ do not get into it.
wheel: setup
	$(BIN)/uv build --quiet --out-dir dist

# The tests' object store has an environment of its own, so that its dependencies do not mix with segray's.
.venv-swift/installed: tests/faults/object_store.txt
	test -x .venv-swift/bin/python || $(PYTHON) -m venv .venv-swift
	.venv-swift/bin/python -m pip install --quiet --requirement tests/faults/object_store.txt
	touch $@

# The tests' server of Azure Blob Storage is a program for Node.js.
.venv-azurite/installed: tests/storage/azurite.txt
	mkdir -p .venv-azurite
	npm install --prefix .venv-azurite --no-audit --no-fund --loglevel=error $$(cat tests/storage/azurite.txt)
	touch $@

.venv-moto/installed: tests/cluster/moto.txt
	test -x .venv-moto/bin/python || $(PYTHON) -m venv .venv-moto
	.venv-moto/bin/python -m pip install --quiet --requirement tests/cluster/moto.txt
	touch $@

# Run it after changing dependencies in pyproject.toml. The result names no package index.
lock:
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev --no-emit-index-url \
	  --custom-compile-command "make lock" --upgrade pyproject.toml --output-file requirements.txt

clean:
	rm -rf .venv .venv-swift .venv-azurite .venv-moto build dist *.egg-info runs/demo
