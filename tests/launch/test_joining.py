"""``--coordinator=auto``, by which ``worker.sh`` joins the workers of a slice: JAX queries the metadata server."""

import contextlib
import http.server
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator

import portpicker
import pytest

from tests.launch.conftest import ROOT

PROGRAM = """
    import os
    import sys
    import jax

    os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # JAX set it because there is no TPU here
    from clip_jax.errors import UserError
    from clip_jax.devices.sharding import initialize_processes

    try:
        initialize_processes("auto", int(sys.argv[1]), None)
        print(f"process {jax.process_index()} of {jax.process_count()}, {jax.device_count()} devices", flush=True)
    except UserError as error:
        print(error, flush=True)
        os._exit(2)
"""


@contextlib.contextmanager
def metadata_server(worker: int, workers: int) -> Iterator[str]:
    """The metadata server of one worker of a TPU VM; yields its address."""
    answers = {
        "agent-worker-number": str(worker),
        "worker-network-endpoints": ",".join(["unused:8470:127.0.0.1"] * workers),
        "tpu-env": "ACCELERATOR_TYPE: 'v4-16'\n",
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer = answers.get(self.path.removeprefix("/computeMetadata/v1/instance/attributes/"))
            self.send_response(404 if answer is None else 200)
            self.end_headers()
            self.wfile.write((answer or "").encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("expected", [2, 4])
def test_the_workers_of_a_slice_join_and_their_number_is_checked(expected):
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "TPU_SKIP_MDS_QUERY")}
    environment |= {
        "JAX_FORCE_TPU_INIT": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_PORT": str(portpicker.pick_unused_port()),
    }
    with contextlib.ExitStack() as servers:
        both = [
            subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(PROGRAM), str(expected)],
                env=environment | {"GCE_METADATA_IP": servers.enter_context(metadata_server(worker, 2))},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for worker in range(2)
        ]
        outputs = [process.communicate(timeout=120)[0] for process in both]
    if expected == 2:
        assert [process.returncode for process in both] == [0, 0], outputs
        assert all(f"process {i} of 2, 2 devices" in outputs[i] for i in range(2)), outputs
    else:
        assert {process.returncode for process in both} == {2}, outputs
        message = "--num_processes=4, but 2 processes are joined: start main.py on every host of the slice, once"
        assert message in outputs[0] and message in outputs[1]
