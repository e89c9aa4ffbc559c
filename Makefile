# make demo   a language model from 16 bits to 4 and back to text
# make test   the tests, against the installed wheel
# make emulated   of them those that run the CUDA kernels on the CPU, and the compile gate
#
# Each makes .venv, installs and runs. Needed beforehand: Python 3.11 or later (with venv), g++, make.
# CMake and Ninja come with pip; nvcc and ccache are used where they are found.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
PYTEST_ARGS ?=
# A process for each core; tests of one file stay together, and share what they built.
PARALLEL ?= -n auto --maxprocesses 4 --dist loadfile

# The CPU wheel of torch: that of PyPI brings gigabytes of CUDA libraries on Linux. TORCH=torch==2.13.0 takes PyPI's.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
ifeq ($(shell uname -s),Linux)
TORCH ?= torch==2.13.0+cpu
else
TORCH ?= torch==2.13.0
endif

SOURCES := pyproject.toml CMakeLists.txt constraints.txt \
  $(shell find cpp cuda third_party python -type f -not -path '*/__pycache__/*' -not -name '*.so')

.PHONY: demo test emulated bench clean

demo: $(VENV)/.installed
	$(VENV)/bin/tersor demo

test: $(VENV)/.tested
	$(VENV)/bin/python -m pytest -q $(PARALLEL) $(PYTEST_ARGS) tests

emulated: $(VENV)/.tested
	$(VENV)/bin/python -m pytest -q $(PARALLEL) $(PYTEST_ARGS) tests/test_emulation.py tests/test_replay.py \
	  tests/test_cuda_*.py tests/test_ops_cuda.py tests/test_kernel_steps.py tests/test_compile_gate.py

bench: $(VENV)/.installed
	$(VENV)/bin/tersor bench

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-deps --retries 2 --extra-index-url $(TORCH_INDEX) '$(TORCH)'
	touch $@

# One CUDA architecture and its PTX run on every supported GPU; a wheel to be shipped has all six (pyproject.toml).
CUDA_ARCHITECTURES ?= 80
BUILD := -C 'cmake.define.TERSOR_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)'

# The emulated instruction set serves the tests alone: without it there is less to compile.
$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(PIP) install --quiet --constraint constraints.txt $(BUILD) -C cmake.define.TERSOR_EMULATE_AVX512=OFF .
	touch $@

$(VENV)/.tested: $(VENV)/.torch $(SOURCES)
	$(PIP) install --quiet --constraint constraints.txt $(BUILD) '.[test]'
	touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) build dist
