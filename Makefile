# make demo       install, then fine-tune the small embedded model on all local GPUs, or on 2 CPU ranks
# make test       the suite, without what takes long
# make test-rest  what make test leaves out: CI runs both, each test once
# make test-full  all of it; with SLURM, pdsh, sshd and Open MPI installed and as root, on four hosts too
# make bench      short benchmarks against PEFT, the authors' recipe and HF Trainer; longer ones: tools/bench/README.md
# make gpu        is this machine right for a run, and how fast? (tools/gpu/README.md); on a CPU what a CPU can show
# make lint       style, import rules and types

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# On GPUs the launcher counts them itself. On a CPU it must be told which accelerator and how many ranks.
ifeq ($(shell nvidia-smi -L 2>/dev/null | grep -c GPU),0)
LAUNCH := DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/deepspeed --num_gpus 2
else
LAUNCH := $(BIN)/deepspeed
endif

.PHONY: demo test test-rest test-full bench gpu lint clean

demo: $(INSTALLED)
	rm -rf runs/demo
	$(LAUNCH) launch/train.py --config launch/configs/demo.yaml

# Two processes, each with whole files: most tests wait for ranks of their own.  In the order of tests/conftest.py: by the
# number of tests those that launch jobs would come last.
test: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not full"

# Four hosts of ranks take both cores, and some count what the loopback carries: one process for those.
test-rest: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist loadfile -m "full and not four_hosts and not alone" --durations=20
	$(BIN)/pytest -m "full and (four_hosts or alone)" --durations=20

test-full: test test-rest

bench: $(INSTALLED)
	$(BIN)/python tools/bench/svd.py --short
	$(BIN)/python tools/bench/init.py --short
	$(BIN)/python tools/bench/step.py --short
	$(BIN)/python tools/bench/phases.py --short

# Also where nothing can be installed: then by the Python that is there.
gpu:
	$(if $(wildcard $(INSTALLED)),$(BIN)/python,$(PYTHON)) tools/gpu/battery.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

# Everything is pinned: an unpinned torch would be another build, with another gigabyte of CUDA.  Megatron-Bridge comes
# without what it depends on, which only GPUs have: tests use its LoRA classes alone.
$(INSTALLED): constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python {sys.version} is too old: 3.11 is needed"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps megatron-bridge
	touch $@

clean:
	rm -rf $(VENV) runs
