# `make demo` and `make test` set everything up by themselves; nothing outside this folder is touched.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: docs install demo quick test test-all test-cpp test-sanitize lint bench static-report gpu-model clean

install: $(STAMP)

# torch first and pinned, so that no other package decides which build arrives.
$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "sfg_fast needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; choose one with: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[job,dev]'
	touch $@

OUT ?= runs/demo
demo: $(STAMP)
	$(BIN)/sfg-fast demo --out $(OUT)

# Nearly every test keeps to one thread.
PROCESSES ?= 2
PYTEST    := $(BIN)/python -m pytest -n $(PROCESSES) --dist worksteal
test: $(STAMP)
	$(PYTEST)

# After a line was changed, in half a minute: style, and what tells most in little time.
QUICK := tests/test_gates.py tests/test_features.py tests/test_package.py tests/layers/test_state.py tests/networks/test_build.py \
	tests/tasks/test_kinds.py tests/data/test_targets.py tests/experiment/test_table.py tests/evaluation/test_metrics.py
quick: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) $(QUICK)

test-all: $(STAMP)
	$(PYTEST) -m 'slow or not slow'

# The C++ kernels alone: needs CMake and a compiler, no Python.
test-cpp:
	cmake -B build/cpp -DCMAKE_BUILD_TYPE=Release
	cmake --build build/cpp
	ctest --test-dir build/cpp --output-on-failure

# Thousands of random problems under AddressSanitizer and UndefinedBehaviorSanitizer. (GCC's OpenMP runtime is not
# instrumented for ThreadSanitizer, which takes its barriers for races.)
test-sanitize:
	cmake -B build/sanitize -DCMAKE_BUILD_TYPE=Release -DSFG_SANITIZE=address,undefined
	cmake --build build/sanitize
	build/sanitize/test_routed_conv 1500

# kernels/ is installed as sfg_fast.kernels: types are checked of both in one tree, with what the tests share beside it.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed && mkdir -p build/typed && cp -r sfg_fast tests build/typed/ && cp -r kernels build/typed/sfg_fast/
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache
	$(BIN)/clang-format --dry-run -Werror kernels/cpu/*.cpp kernels/cpu/*.h tests/kernels/*.cpp

bench: $(STAMP)
	$(BIN)/python -m benchmarks.bench_layers
	$(BIN)/python -m benchmarks.bench_reference
	$(BIN)/python -m benchmarks.bench_chain
	$(BIN)/python -m benchmarks.bench_freeze
	$(BIN)/python -m benchmarks.bench_scale

# build/docs/index.html; every warning is an error.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

# What the compilers make of the Triton kernels, for GPUs that need not be there: about 20 minutes.
static-report: $(STAMP)
	$(BIN)/python benchmarks/static_report.py --markdown benchmarks/results/triton_static.md

# What the model of benchmarks/roofline.py predicts for every pass, beside what an H200 measured: about 3 minutes.
gpu-model: $(STAMP)
	$(BIN)/python benchmarks/gpu_model.py --markdown benchmarks/results/gpu_model.md

clean:
	rm -rf build $(VENV)
