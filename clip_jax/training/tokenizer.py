"""The tokenizer of a run: trained or fetched once, stored in the run folder, the same on every process."""

import collections
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from clip_jax import config as configs
from clip_jax.data import tokenizers
from clip_jax.data.sources.mixture import Mixture
from clip_jax.data.sources.sample import BadSampleError, Source
from clip_jax.data.stream import read
from clip_jax.data.tokenizers import Tokenizer, stored
from clip_jax.errors import UserError
from clip_jax.interop import folders


def prepare_tokenizer(workdir: Path, config: ConfigDict, source: Source) -> Tokenizer:
    """The run's tokenizer, from its folder. Where there is none yet, process 0 makes it for all processes."""
    preset = configs.resolve_preset(config)
    kind, length = preset.tokenizer, preset.architecture.text.context_length
    file = stored.tokenizer_file(workdir, kind)
    if jax.process_index() == 0 and file is None:
        made = _make_tokenizer(workdir, kind, config, source, preset.architecture.text.vocab_size)
        stored.write_tokenizer(workdir, kind, made)
    if jax.process_count() > 1:
        file = stored.tokenizer_file(workdir, kind)
        made = _broadcast(file.read_bytes() if file is not None else b"")
        if stored.tokenizer_file(workdir, kind) is None:  # no disk is shared
            stored.write_tokenizer(workdir, kind, made)
    return stored.open_tokenizer(workdir, kind, length)


def _make_tokenizer(workdir: Path, kind: str, config: ConfigDict, source: Source, vocab_size: int) -> bytes:
    """The content of the file: given, that of the initial weights, trained on the run's captions, or published."""
    vocab = Path(config.tokenizer.vocab).expanduser() if config.tokenizer.vocab else _of_weights(config, kind)
    if kind == "sentencepiece" and vocab is None:
        file = workdir / "tokenizer" / "training.model"
        tokenizers.train_sentencepiece(_captions(source, config.tokenizer.train_captions), vocab_size, file)
        made = file.read_bytes()
        file.unlink()
        return made
    if kind == "clip":
        merges = tokenizers.clip(vocab).codec.merges
        lines = ["#version: CLIP", *(" ".join(pair) for pair in merges)]
        return ("\n".join(lines) + "\n").encode()
    file = vocab or tokenizers.hub.download(kind, vocab_size)
    tokenizers.KINDS[kind](file, 64)  # raises UserError if it is not a vocabulary of this kind
    return file.read_bytes()


def _of_weights(config: ConfigDict, kind: str) -> Path | None:
    """The file of this kind beside the weights that the run starts from: in another vocabulary ids mean other words."""
    if not config.model.init_from:
        return None
    source = folders.local(config.model.init_from)
    folder = source.parent if source.is_file() else source
    found = [tokenizers.files.find(candidate, kind) for candidate in (folder, folder / stored.FOLDER)]
    return next((file for file in found if file is not None), None)


def _captions(source: Source, examples: int) -> Iterator[str]:
    """The captions of the first examples (of a mixture, of each of its sources), without those of bad ones.

    Raises UserError if all are bad.
    """
    faults: collections.Counter = collections.Counter()
    several = isinstance(source, Mixture)
    indices = source.some(examples) if several else range(min(examples, len(source)))
    for index in indices:
        try:
            yield from read(source, index).captions
        except BadSampleError as error:
            faults[error.reason] += 1
    if faults.total() == len(indices):
        reasons = ", ".join(f"{n} {reason}" for reason, n in faults.most_common())
        raise UserError(f"{source.name}: no captions to train a tokenizer on in {len(indices)} examples ({reasons})")


def _broadcast(data: bytes) -> bytes:
    """Process 0's bytes on every process."""
    size = int(multihost_utils.broadcast_one_to_all(np.int64(len(data))))
    padded = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        padded[:] = np.frombuffer(data, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded)))
