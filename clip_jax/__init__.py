"""clip_jax: pretrain CLIP models in JAX, from a laptop to a TPU pod.

model = clip_jax.load("runs/demo")
model.similarity(model.encode_image("photo.jpg"), model.encode_text(["a red circle", "a blue square"]))
"""

from clip_jax.version import __version__

__all__ = ["__version__", "list_models", "load"]


def __getattr__(name: str):
    # JAX is imported when it is first needed: `import clip_jax` and `clip-jax --help` stay quick.
    if name == "load":
        from clip_jax.model import load

        return load
    if name == "list_models":
        from clip_jax.presets import list_models

        return list_models
    raise AttributeError(f"module 'clip_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
