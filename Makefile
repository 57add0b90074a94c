# make demo       pretrain, evaluate and plot a small CLIP on this machine (three minutes on two cores)
# make test       lint and the fast tests          make test-all   the slow tests
# make test-exhaustive  what the slow tests show, on every mesh and recipe; before a release
# make test-jax   the fast tests that depend on the version of JAX
# make install    only the environment             make clean      remove environments and runs
# make test-plan  the plan with the TPU compiler, which it downloads; needs no TPU
# Every path is relative, so that a folder name may contain a space. PYTHON and VENV may be set.

PYTHON ?= python3
VENV ?= .venv
PEERS ?= .venv-peers
RUN = $(VENV)/bin/python
# glibc then requests large pages from the kernel: a third faster to train on a CPU, a tenth to test, no effect elsewhere.
CPU_MEMORY = GLIBC_TUNABLES=glibc.malloc.hugetlb=1
TESTS = $(CPU_MEMORY) $(RUN) -m pytest
# The tests of a file share fixtures and compiled programs: they run in one worker.
# The order is that of tests/conftest.py: files that take long come first.
PARALLEL = $(TESTS) -n 2 --dist=loadfile --no-loadscope-reorder
FAST = $(PARALLEL) -m 'not slow and not parity and not exhaustive'

.PHONY: install test test-jax test-all test-exhaustive test-plan demo peers clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is not Python 3.11 or newer; try make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

test: $(VENV)/.installed-test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(FAST)

# Files, text, pages, weights of other libraries and metrics are the same under every JAX; so are signals and folders.
# A whole run under it is in test_resume.py.
test-jax: $(VENV)/.installed-test
	$(PARALLEL) -m '(not slow or every_jax) and not parity and not exhaustive' \
	  --ignore=tests/training/test_stop.py --ignore=tests/training/test_restart.py \
	  --ignore=tests/training/test_run.py --ignore=tests/training/test_stored_images.py \
	  tests/devices tests/losses tests/models tests/objectives tests/storage tests/training \
	  tests/evaluation/test_program.py tests/planning/test_program.py tests/planning/test_memory.py tests/test_model.py

test-all: $(VENV)/.installed-test
	$(PARALLEL) -rs -m '(slow or parity) and not exhaustive'

test-exhaustive: $(VENV)/.installed-test
	$(PARALLEL) -m exhaustive

demo: $(VENV)/.installed
	$(CPU_MEMORY) $(RUN) main.py --config=configs/demo.py --workdir=runs/demo

# The TPU compiler gets a separate folder, so that all other tests run without it.
.libtpu/.installed: $(VENV)/.installed-test
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --target .libtpu \
	  "$$($(RUN) -c 'import importlib.metadata as m; print(*(r.split(";")[0] for r in m.requires("jax") if r.startswith("libtpu")))')"
	touch $@

test-plan: .libtpu/.installed
	PYTHONPATH="$(CURDIR)/.libtpu" $(TESTS) tests/planning/test_compiling.py

peers:
	tests/peers/make_env.sh $(PEERS)

clean:
	rm -rf .venv .venv-* .libtpu runs
