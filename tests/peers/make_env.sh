#!/usr/bin/env bash
# Builds the environment of the libraries we compare with, apart from ours, which never holds torch.
#
#   tests/peers/make_env.sh DIR [PYTHON]     about 2 GB and a few minutes; at once when DIR is already built
#
# Parity tests and benchmarks run their half under DIR/bin/python and find DIR in CLIP_JAX_PEERS, or at .venv-peers.
set -euo pipefail

dir=${1:?usage: make_env.sh DIR [PYTHON]}
python=${2:-python3.11}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
command -v "$python" >/dev/null || python=python3

if [ -e "$dir/.complete" ]; then
  echo "$dir: already built"
  exit 0
fi

# A build that was cut off left half an environment and no .complete: start again, but never empty any other folder.
if [ -n "$(ls -A "$dir" 2>/dev/null)" ] && [ ! -e "$dir/pyvenv.cfg" ]; then
  echo "$dir: holds something else than a virtual environment; give a new folder" >&2
  exit 2
fi
"$python" -m venv --clear "$dir"
install() { "$dir/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

install torch==2.13.0
install transformers safetensors sentencepiece protobuf ftfy regex huggingface_hub \
  numpy pillow pandas scikit-learn tqdm webdataset==0.2.86
# These ask for a CUDA torchvision and training extras that nothing here uses; what they import is installed above.
install --no-deps torchvision==0.29.2 timm open_clip_torch clip_benchmark braceexpand sentence-transformers

cp "$here/torchvision_ops_stub.py" "$("$dir/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/"
"$dir/bin/python" - <<'PY'
import torchvision_ops_stub  # noqa: F401  before open_clip, which imports torchvision
import open_clip, torch, transformers

print("peers: torch", torch.__version__, "open_clip", open_clip.__version__, "transformers", transformers.__version__)
PY
touch "$dir/.complete" # last, so that only a whole environment carries it
