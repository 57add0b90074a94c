"""The vocabularies of published models, from the Hugging Face hub or from its cache on this machine."""

from pathlib import Path

from clip_jax.data.tokenizers.files import FILES, OPENAI_MERGES
from clip_jax.errors import UserError

REPOSITORIES = {
    "clip": "openai/clip-vit-base-patch32",
    "clipa": "bert-base-uncased",
    "siglip": "timm/ViT-B-16-SigLIP",
    "siglip2": "timm/ViT-B-16-SigLIP2",
}
"""By kind, the repository that OpenCLIP uses, so that its users have it in their cache."""

SIGLIP_MULTILINGUAL = "timm/ViT-B-16-SigLIP-i18n-256"


def repository(kind: str, vocab_size: int | None = None) -> str:
    """The repository of a kind; SigLIP has two vocabularies of the same kind, which differ in size."""
    if kind == "siglip" and vocab_size is not None and vocab_size > 32_000:
        return SIGLIP_MULTILINGUAL
    return REPOSITORIES[kind]


def download(kind: str, vocab_size: int | None = None) -> Path:
    """The file in the Hugging Face cache, or downloaded once. UserError if neither is possible."""
    # Imported here: half a second of start-up that a given file saves.
    from huggingface_hub import hf_hub_download

    source, names = repository(kind, vocab_size), FILES[kind]
    for name, local in [*((name, True) for name in names), (names[0], False)]:
        try:
            return Path(hf_hub_download(source, name, local_files_only=local))
        except Exception as error:  # The hub's client has a dozen ways to report that there is no network.
            last = error
    given = OPENAI_MERGES if kind == "clip" else names[0]
    raise UserError(
        f"the vocabulary of the tokenizer {kind!r} is neither given, nor in the Hugging Face cache, nor can be "
        f"downloaded from {source}: give the path of a {given} (in a run: config.tokenizer.vocab)"
    ) from last
