# make demo       pretrain, evaluate and plot a small CLIP on this machine (five minutes on two cores)
# make test       lint and the fast tests          make test-all   the slow ones
# make install    the environment alone            make clean      remove environments and runs
# make test-plan  the plan with the TPU compiler, which it fetches; needs no TPU
# Every path is relative, so that a folder with a space in its name works. PYTHON and VENV may be set.

PYTHON ?= python3
VENV ?= .venv
PEERS ?= .venv-peers
RUN = $(VENV)/bin/python
TESTS = $(RUN) -m pytest
# glibc then asks the kernel for large pages: a third faster on a CPU, without effect elsewhere.
CPU_MEMORY = GLIBC_TUNABLES=glibc.malloc.hugetlb=1

.PHONY: install test test-all test-plan demo peers clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is no Python 3.11 or newer; try make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

test: $(VENV)/.installed-test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(TESTS) -n 2 -m 'not slow and not parity'

test-all: $(VENV)/.installed-test
	$(TESTS) -n 2 --dist=loadfile -rs -m 'slow or parity'

demo: $(VENV)/.installed
	$(CPU_MEMORY) $(RUN) main.py --config=configs/demo.py --workdir=runs/demo

# The TPU compiler in a folder of its own: what needs no TPU compiler is tested without one.
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
