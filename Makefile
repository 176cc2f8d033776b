# Everything runs in .venv, which is created from python3. If python3 already has the packages, PYTHON=python3 uses it
# instead and installs nothing: make gpu-test PYTHON=python3
# make bench writes a file of records to OUT; BENCH has more options for pytest: make bench BENCH='-m "not compiled"'
# make gpu-check writes its results to CHECK (default: OUT if set, else build/gpu-check), with options in GPU_CHECK:
# make gpu-check GPU_CHECK='--only smoke'. make report CHECK=FOLDER makes records of them
VENV := .venv
PYTHON := $(VENV)/bin/python
CONSTRAINTS := constraints.txt
OUT ?= bench/results
CHECK ?= $(if $(filter file,$(origin OUT)),build/gpu-check,$(OUT))

ifeq ($(PYTHON),$(VENV)/bin/python)
package := $(VENV)/package
test := $(VENV)/test
bench := $(VENV)/bench
docs := $(VENV)/docs
endif

.PHONY: sample test lint docs wheel gpu-test gpu-check bench smoke report clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

sample: $(package)
	$(PYTHON) -m fastddpm sample --out samples.png

test: lint
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2

lint: $(test)
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -c 'from clang_format import clang_format; clang_format()' --dry-run -Werror kernels/cpu/*.cpp kernels/cpu/*.h
	$(PYTHON) -m mypy

# The documentation, in build/docs; a warning is an error
docs: $(docs)
	$(PYTHON) -m sphinx -W --keep-going -q -E docs build/docs

# A wheel in dist, and the Linux systems that it runs on
wheel: $(test)
	rm -rf dist
	$(PYTHON) -m build --wheel --no-isolation
	$(PYTHON) -m auditwheel show dist/*.whl

gpu-test: $(test)
	$(PYTHON) -m pytest -m cuda

# Nine minutes on a GPU. Makes .venv only if neither .venv nor a python3 with torch exists: there may be no network
gpu-check:
	@python=$(PYTHON); \
	if [ $$python = $(VENV)/bin/python ] && [ ! -e $(VENV)/bench ]; then \
		if python3 -c 'import torch' 2> /dev/null; then python=python3; else $(MAKE) $(VENV)/bench || exit; fi; \
	fi; \
	$$python -m bench.gpu_check --out $(CHECK) $(GPU_CHECK)

bench: $(bench)
	$(PYTHON) -m pytest bench --records $(OUT) $(BENCH)

# Everything that make bench does, at tiny sizes
smoke: $(bench)
	rm -rf build/smoke
	BENCH_TINY=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest bench --records build/smoke --benchmark-min-rounds=2 \
		--benchmark-max-time=0 $(BENCH)
	$(PYTHON) -m bench.report build/smoke --out build/smoke/report.html
	BENCH_TINY=1 OMP_NUM_THREADS=1 $(PYTHON) -m bench.gpu_check --device cpu --out build/smoke/gpu-check
	$(PYTHON) -m bench.gpu_records build/smoke/gpu-check --results build/smoke

report: $(bench)
	$(if $(filter-out file,$(origin CHECK)),$(PYTHON) -m bench.gpu_records $(CHECK) --results $(OUT))
	$(PYTHON) -m bench.report $(OUT)
	$(PYTHON) -m bench.readme

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	python3 -m venv $(VENV)

# What is installed depends on these files alone: the package itself is installed as editable, and builds its C++ kernels
# anew when their sources change. To try other versions of torch and triton: make test CONSTRAINTS=FILE VENV=FOLDER
$(VENV)/package: pyproject.toml setup.py $(CONSTRAINTS) | $(VENV)/bin/python
	$(PYTHON) -m pip install --constraint $(CONSTRAINTS) --editable .
	@touch $@

$(VENV)/test $(VENV)/bench $(VENV)/docs: pyproject.toml setup.py $(CONSTRAINTS) | $(VENV)/bin/python
	$(PYTHON) -m pip install --constraint $(CONSTRAINTS) --editable '.[$(@F)]'
	@touch $@
