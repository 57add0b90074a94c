"""Captions per second on one core: our CLIP tokenizer and OpenCLIP's on real captions.

    python benchmarks/tokenization.py [--repeats=7]

Needs ../shared/data and the environment of tests/peers/make_env.sh (CLIP_JAX_PEERS, or .venv-peers). Both processes are
pinned to the same core and take turns, so that a busy machine slows both equally. The "first" pass starts with an empty
cache of words, the "later" pass has all words of these captions cached. A real run is in between, and close to the
later pass for languages that separate words by spaces.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time

import peer

from clip_jax.data import tokenizers

DATA = peer.ROOT.parent / "shared" / "data"
VOCAB = DATA / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz"

# For each line on stdin, the name of a set of captions, prints the seconds of a first and of a second pass over it.
OPEN_CLIP = """
import json, sys, time
import torchvision_ops_stub  # before open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer

torch.set_num_threads(1)
captions = json.load(open(sys.argv[1]))
print("ready", flush=True)
for name in map(str.strip, sys.stdin):
    tokenizer, seconds = SimpleTokenizer(), []
    for _ in range(2):
        start = time.perf_counter()
        tokenizer(captions[name])
        seconds.append(time.perf_counter() - start)
    print(json.dumps(seconds), flush=True)
"""


def read_captions() -> dict[str, list[str]]:
    languages: dict[str, list[str]] = {}
    for shard in sorted((DATA / "emoji").glob("train-*.tar")):
        with tarfile.open(shard) as tar:
            for name in tar.getnames():
                if name.endswith(".json"):
                    for language, caption in json.load(tar.extractfile(name))["captions"].items():
                        languages.setdefault(language, []).append(caption)
    return {"English": languages["en"], f"{len(languages)} languages": list(itertools.chain(*languages.values()))}


def our_seconds(captions: list[str]) -> list[float]:
    tokenizer, seconds = tokenizers.clip(VOCAB), []
    for _ in range(2):
        start = time.perf_counter()
        tokenizer(captions)
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(captions: dict[str, list[str]], repeats: int) -> dict[str, list[tuple[list[float], list[float]]]]:
    """``repeats`` timings of each set: (ours, OpenCLIP's), each the seconds of a first and of a second pass."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # inherited by the peer
    pairs = {name: [] for name in captions}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(captions, file)
        file.flush()
        with peer.started(OPEN_CLIP, file.name) as ask:
            for _ in range(repeats):
                for name, texts in captions.items():
                    pairs[name].append((our_seconds(texts), ask(name)))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    if not VOCAB.exists():
        sys.exit(f"{DATA}: no such folder; the captions to measure are there")
    captions = read_captions()
    pairs = measure(captions, repeats)
    print(f"{'captions':<16}{'pass':<8}{'ours /s':>12}{'OpenCLIP /s':>14}{'ratio':>8}{'lowest':>9}{'highest':>9}")
    for name, texts in captions.items():
        for number, passed in enumerate(("first", "later")):
            ours, theirs, ratios = zip(
                *((len(texts) / o[number], len(texts) / t[number], t[number] / o[number]) for o, t in pairs[name]),
                strict=True,
            )
            speeds = f"{statistics.median(ours):>12,.0f}{statistics.median(theirs):>14,.0f}"
            spread = f"{statistics.median(ratios):>8.1f}{min(ratios):>9.1f}{max(ratios):>9.1f}"
            print(f"{name:<16}{passed:<8}{speeds}{spread}")


if __name__ == "__main__":
    main()
