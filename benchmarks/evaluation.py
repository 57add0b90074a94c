"""Seconds and memory of evaluation on a CPU: classification, prompts, retrieval, exact search, embedding of photos.

    python benchmarks/evaluation.py [--part=classify --part=search ...] [--repeats=5] [--vectors=1000000]

Every part runs in a process of its own, so that its peak memory is its own. ``search`` takes turns with faiss's flat
index where faiss is installed; ``prompts`` and ``embed`` take turns with the tower's bare forward pass on the same
batches, a ViT-B/32 with random weights (``--model``). Process seconds are given beside wall seconds: on a busy machine
they are the more telling.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import peer

MIB = 2**20


def unit(n: int, dim: int = 512, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, dim), dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def measure(*functions: Callable, repeats: int) -> list[tuple[list[float], list[float]]]:
    """(wall, process) seconds of each function, interleaved; each is called once before."""
    for function in functions:
        function()
    found = [([], []) for _ in functions]
    for _ in range(repeats):
        for function, (wall, process) in zip(functions, found, strict=True):
            start, used = time.perf_counter(), time.process_time()
            function()
            wall.append(time.perf_counter() - start)
            process.append(time.process_time() - used)
    return found


def show(name: str, seconds: tuple[list[float], list[float]], memory: int | None = None) -> None:
    grown = "" if memory is None else f", {memory / MIB:.0f} MiB more than before"
    print(f"{name}: {statistics.median(seconds[0]):.2f} s, {statistics.median(seconds[1]):.2f} process s{grown}")


def _show_ratio(name: str, found: list[tuple[list[float], list[float]]]) -> None:
    (wall, process), (other_wall, other_process) = found
    print(f"{name} / ours: {peer.ratio(wall, other_wall)} wall, {peer.ratio(process, other_process)} process")


def classify(args: argparse.Namespace) -> None:
    from clip_jax.evaluation import zero_shot

    images, classes = unit(50_000), unit(1000, seed=1)
    labels, before = np.arange(50_000) % 1000, peer.start_peak()
    (found,) = measure(lambda: zero_shot.accuracy(images, labels, classes), repeats=args.repeats)
    show("zero-shot, 50,000 embeddings, 1,000 classes", found, peer.peak() - before)


def retrieval(args: argparse.Namespace) -> None:
    from clip_jax.evaluation.retrieval import retrieval

    images, owner = unit(5000), np.repeat(np.arange(5000), 5)
    texts = 0.3 * images[owner] + unit(25_000, seed=1)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    before = peer.start_peak()
    (found,) = measure(lambda: retrieval(images, texts, owner), repeats=args.repeats)
    show("retrieval, 25,000 captions, 5,000 images", found, peer.peak() - before)


def search(args: argparse.Namespace) -> None:
    from clip_jax.evaluation.search import search

    index = unit(args.vectors)
    queries = index[:1000] + 0.1 * unit(1000, seed=1)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    functions, name = [lambda: search(queries, [index], 10)], f"search, 1,000 queries in {args.vectors:,} vectors"
    try:
        import faiss
    except ImportError:
        print("faiss is not installed: no comparison")
    else:
        flat = faiss.IndexFlatIP(512)
        flat.add(index)
        functions.append(lambda: flat.search(queries, 10))
        assert np.mean(functions[1]()[1] == functions[0]().number) > 0.999
    found = measure(*functions, repeats=args.repeats)
    show(name, found[0])
    if len(found) > 1:
        show("faiss, IndexFlatIP", found[1])
        print(
            f"faiss / ours: {peer.ratio(found[0][0], found[1][0])} wall, {peer.ratio(found[0][1], found[1][1])} process"
        )


def _model(args: argparse.Namespace):
    """(embedder, weights, a tokenizer of codes) of a preset with random weights: nothing is downloaded."""
    import flax.linen as nn
    import jax

    from clip_jax import presets
    from clip_jax.devices.sharding import make_mesh
    from clip_jax.evaluation.embed import Variables, make_embedder
    from clip_jax.models.clip import CLIP
    from clip_jax.models.compute import Compute

    preset, mesh = presets.preset(args.model), make_mesh()
    clip = CLIP(preset.architecture, Compute(mesh=mesh))
    params = nn.meta.unbox(jax.jit(clip.init)(jax.random.key(0)))
    length, vocabulary = preset.architecture.text.context_length, preset.architecture.text.vocab_size

    def tokenizer(texts):
        return np.array([[ord(c) % (vocabulary - 2) for c in text[:length].ljust(length)] for text in texts], np.int32)

    embedder = make_embedder(clip, preset.preprocess, tokenizer, mesh, args.batch, workers=2)
    return embedder, Variables(params, clip.init_batch_stats())


def prompts(args: argparse.Namespace) -> None:
    from clip_jax.devices.sharding import to_devices
    from clip_jax.evaluation import zero_shot
    from clip_jax.evaluation.embed import embed_texts

    embedder, weights = _model(args)
    names, templates = [f"class {i}" for i in range(args.batch)], [f"{i} photos of a {{}}." for i in range(4)]
    tokens = embedder.tokenizer(["a photo of a class."] * args.batch)
    batch = to_devices({"text": tokens}, embedder.mesh, args.batch)["text"]

    def bare() -> None:
        for _ in templates:
            embedder.encoders.text(weights, batch).block_until_ready()

    ours = measure(
        lambda: zero_shot.classifier(names, templates, lambda texts: embed_texts(embedder, weights, texts)),
        bare,
        repeats=args.repeats,
    )
    show(f"{len(names) * len(templates)} prompts", ours[0])
    _show_ratio("the text tower's bare forward pass", ours)


def embed(args: argparse.Namespace) -> None:
    import io

    from PIL import Image

    from clip_jax.data.sources.sample import Sample
    from clip_jax.devices.sharding import to_devices
    from clip_jax.evaluation.embed import embed_source

    embedder, weights = _model(args)
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)

    class Photos:
        name, fingerprint, class_names = "photos", "photos", ()

        def __len__(self):
            return 4 * args.batch

        def __getitem__(self, index):
            return Sample(file.getvalue(), ("a photo",), str(index))

    size = embedder.image_size
    pixels = {"image": np.zeros((args.batch, size, size, 3), np.uint8), "valid": np.ones(args.batch, bool)}
    batch = to_devices(pixels, embedder.mesh, args.batch)

    def bare() -> None:
        for _ in range(4):
            embedder.encoders.image(weights, batch["image"], batch["valid"])[0].block_until_ready()

    ours = measure(lambda: embed_source(embedder, weights, Photos(), texts=False), bare, repeats=args.repeats)
    show(f"{4 * args.batch} photos of 640x480", ours[0])
    _show_ratio("the image tower's bare forward pass", ours)


PARTS = {"classify": classify, "prompts": prompts, "retrieval": retrieval, "search": search, "embed": embed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--model", default="ViT-B/32")
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    if args.part and len(args.part) == 1:
        PARTS[args.part[0]](args)
        return
    shared = [f"--{name}={getattr(args, name)}" for name in ("repeats", "vectors", "model", "batch")]
    for part in args.part or PARTS:
        subprocess.run([sys.executable, __file__, f"--part={part}", *shared], check=True)


if __name__ == "__main__":
    main()
