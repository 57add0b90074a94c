"""The vocabularies of published models: which repository of the Hugging Face hub has them, and the file from there."""

from pathlib import Path
from typing import NamedTuple

from clip_jax.errors import UserError


class Published(NamedTuple):
    """Where a vocabulary is."""

    repository: str
    """The one that OpenCLIP names, so that its users have it in their cache."""
    files: tuple[str, ...]
    """Each is enough to build the tokenizer; the surest first."""


CLIP = Published("openai/clip-vit-base-patch32", ("merges.txt", "tokenizer.json"))
CLIPA = Published("bert-base-uncased", ("vocab.txt", "tokenizer.json"))
SIGLIP = Published("timm/ViT-B-16-SigLIP", ("tokenizer.json",))
SIGLIP_MULTILINGUAL = Published("timm/ViT-B-16-SigLIP-i18n-256", ("tokenizer.json",))
SIGLIP2 = Published("timm/ViT-B-16-SigLIP2", ("tokenizer.json",))


def published(kind: str, vocab_size: int | None = None) -> Published:
    """Where the vocabulary of a kind is; SigLIP has two of the same kind, which their sizes tell apart."""
    if kind == "siglip" and vocab_size is not None and vocab_size > 32_000:
        return SIGLIP_MULTILINGUAL
    return {"clip": CLIP, "clipa": CLIPA, "siglip": SIGLIP, "siglip2": SIGLIP2}[kind]


def download(kind: str, vocab_size: int | None = None) -> Path:
    """The file from the Hugging Face cache, or downloaded once. UserError where neither is possible."""
    # Imported here: half a second of start-up that a given file saves.
    from huggingface_hub import hf_hub_download

    repository, files = published(kind, vocab_size)
    for name, local in [*((name, True) for name in files), (files[0], False)]:
        try:
            return Path(hf_hub_download(repository, name, local_files_only=local))
        except Exception as error:  # The hub's client has a dozen ways to say that there is no network.
            last = error
    given = "bpe_simple_vocab_16e6.txt.gz" if kind == "clip" else files[0]
    raise UserError(
        f"the vocabulary of the tokenizer {kind!r} is neither given, nor in the Hugging Face cache, nor can be "
        f"downloaded from {repository}: give the path of a {given} (in a run: config.tokenizer.vocab)"
    ) from last
