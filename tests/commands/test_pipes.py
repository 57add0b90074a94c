"""How a command ends early: nobody reads all of its output, there is a Ctrl-C, or memory is lacking."""

import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from clip_jax import commands, errors, interrupts
from tests.training.runs import ROOT

PLAN = "-m clip_jax plan --config=configs/demo.py --gpu=h100 --estimate"


@pytest.mark.slow
def test_a_reader_that_closes_the_pipe_early_is_no_error():
    command = f'"{sys.executable}" {PLAN} | true; echo codes ${{PIPESTATUS[@]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "codes 0 0\n", done.stderr
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr, done.stderr


BUSY = """
import hashlib, sys
from clip_jax import commands

def run(arguments):
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # the main thread runs no Python, as while XLA compiles

commands.COMMANDS["models"].run = run
sys.argv = ["clip-jax", "models"]
sys.exit(commands.main())
"""


def test_ctrl_c_is_one_line_and_130():
    command = ["env", "--default-signal=INT", sys.executable, "-c", BUSY]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert (process.returncode, said) == (130, "clip-jax models: interrupted\n")


IMPORTING = """
import runpy, sys, time

class Slow:
    def find_spec(self, name, *_):
        if name == "clip_jax.commands":
            print("begun", flush=True)
            time.sleep(600)

sys.meta_path.insert(0, Slow())
sys.argv = [sys.argv[1]]
"""
PROGRAMS = {
    "main.py": ("runpy.run_path('main.py', run_name='__main__')", f"main.py: {interrupts.EARLY}\n"),
    "clip-jax": ("runpy.run_module('clip_jax', run_name='__main__')", "clip-jax: interrupted\n"),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_during_the_imports_is_one_line_and_130(program):
    start, line = PROGRAMS[program]
    command = ["env", "--default-signal=INT", sys.executable, "-c", IMPORTING + start, program]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert (process.returncode, said) == (130, line)


@pytest.mark.parametrize(("command", "advice"), [("classify", "): end other"), ("embed", "lower --batch-size, or ")])
@pytest.mark.parametrize("where", ["device", "host"])
def test_out_of_memory_is_one_line_and_45(where, command, advice, monkeypatch, capsys):
    def too_large(_):
        if where == "host":
            raise MemoryError
        jax.block_until_ready(jnp.zeros(1 << 50, jnp.float32))

    monkeypatch.setattr(commands.COMMANDS[command], "run", too_large)
    arguments = {
        "classify": ["--model=m", "--image=i", "--labels=a"],
        "embed": ["--model=m", "--data=folder:d", "--output=o"],
    }[command]
    assert commands.main([command, *arguments]) == errors.EXIT_OUT_OF_MEMORY
    said = capsys.readouterr().err
    assert said.startswith(f"clip-jax {command}: out of memory (") and advice in said and said.count("\n") == 1
