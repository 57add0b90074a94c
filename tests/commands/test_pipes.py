"""How a command ends early: its output is piped to a program that does not read all of it, or there is a Ctrl-C."""

import signal
import subprocess
import sys

PLAN = "-m clip_jax plan --config=configs/demo.py --gpu=h100 --estimate"


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
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "clip-jax models: interrupted\n")
