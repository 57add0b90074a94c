"""big_vision's npz checkpoints of SigLIP <-> OpenCLIP's names (timm's image tower, OpenCLIP's text tower).

SigLIP's checkpoints have one group of arrays per block, SigLIP 2's stack all blocks; both are read, the first is
written. A file does not say which model it is, and big_vision computes every GELU by its tanh approximation (Flax's
default).
"""

import dataclasses
from functools import lru_cache

from clip_jax.errors import UserError
from clip_jax.interop import rename
from clip_jax.interop.huggingface import is_siglip
from clip_jax.interop.rename import NO_LEADING_ONE, SAME, SCALAR, TRANSPOSED, Form, Rule, below, layers, same
from clip_jax.interop.tensors import Entry, Tensors
from clip_jax.models.clip import Architecture

ROOT = "params/"
STACKED, BLOCK = "/encoderblock/", "/encoderblock_{}/"

PATCHES = Form(lambda x: x.transpose(3, 2, 0, 1), lambda x: x.transpose(2, 3, 1, 0))


def activations(architecture: Architecture) -> Architecture:
    """The architecture with big_vision's GELU in both towers."""
    image, text = (
        dataclasses.replace(tower, activation="gelu_tanh") for tower in (architecture.image, architecture.text)
    )
    return dataclasses.replace(architecture, image=image, text=text)


def to_open_clip(tensors: Tensors, architecture: Architecture) -> Tensors:
    """big_vision's arrays under OpenCLIP's names, without the state of an optimizer."""
    entries = tensors.entries
    if any(name.startswith(ROOT) for name in entries):
        entries = {name.removeprefix(ROOT): entry for name, entry in entries.items() if name.startswith(ROOT)}
    return rename.to_open_clip(_unstacked(Tensors(tensors.source, entries)), _rules(architecture))


def from_open_clip(tensors: Tensors, architecture: Architecture) -> Tensors:
    """OpenCLIP's tensors under big_vision's names."""
    renamed = rename.from_open_clip(tensors, _rules(architecture))
    return Tensors(tensors.source, {ROOT + name: entry for name, entry in renamed.entries.items()})


def _unstacked(tensors: Tensors) -> Tensors:
    """Splits arrays that stack all blocks into one array per block."""
    entries = {}
    for name, entry in tensors.entries.items():
        if STACKED not in name:
            entries[name] = entry
            continue
        # Query, key and value of the blocks are read in turn: without the cache each would read the stack again.
        read = lru_cache(1)(entry.read)
        for i in range(entry.shape[0]):
            block = Entry(entry.shape[1:], entry.dtype, lambda read=read, i=i: read()[i])
            entries[name.replace(STACKED, BLOCK.format(i))] = block
    return Tensors(tensors.source, entries)


def _pair(theirs: str, open_clip: str, form: Form = TRANSPOSED, scale: str = "kernel") -> tuple[Rule, Rule]:
    return same(f"{theirs}/{scale}", f"{open_clip}.weight", form), same(f"{theirs}/bias", f"{open_clip}.bias")


def _norm(theirs: str, open_clip: str) -> tuple[Rule, Rule]:
    return _pair(theirs, open_clip, SAME, "scale")


def _attention(heads: int, groups: dict[str, str], out: str) -> list[Rule]:
    """``groups``: for each tensor of OpenCLIP's, the names of the projections that it fuses."""
    kernel = Form(lambda x: x.reshape(len(x), -1).T, lambda x: x.T.reshape(x.shape[1], heads, -1))
    bias = Form(lambda x: x.reshape(-1), lambda x: x.reshape(heads, -1))
    back = Form(lambda x: x.reshape(-1, x.shape[-1]).T, lambda x: x.T.reshape(heads, -1, len(x)))
    rules = []
    for open_clip, names in groups.items():
        for ours, theirs, form in (("weight", "kernel", kernel), ("bias", "bias", bias)):
            rules.append(Rule(tuple(f"{name}/{theirs}" for name in names.split()), (open_clip.format(ours),), form))
    return [*rules, *_pair("out", out, back)]


def _block(heads: int, fused: str, out: str, norms: tuple[str, str], mlp: tuple[str, str]) -> list[Rule]:
    attention = _attention(heads, {fused: "query key value"}, out)
    return [
        *_norm("LayerNorm_0", norms[0]),
        *below("MultiHeadDotProductAttention_0/", "", attention),
        *_norm("LayerNorm_1", norms[1]),
        *_pair("MlpBlock_0/Dense_0", mlp[0]),
        *_pair("MlpBlock_0/Dense_1", mlp[1]),
    ]


def _head(heads: int) -> list[Rule]:
    attention = _attention(heads, {"q.{}": "query", "kv.{}": "key value"}, "proj")
    return [
        same("probe", "latent"),
        *below("MultiHeadDotProductAttention_0/", "", attention),
        *_norm("LayerNorm_0", "norm"),
        *_pair("MlpBlock_0/Dense_0", "mlp.fc1"),
        *_pair("MlpBlock_0/Dense_1", "mlp.fc2"),
    ]


def _rules(architecture: Architecture) -> list[Rule]:
    if not is_siglip(architecture):
        raise UserError("of big_vision's models only SigLIP's towers are supported (no class token, attention pooling)")
    image, text = architecture.image, architecture.text
    image_block = _block(image.heads, "attn.qkv.{}", "attn.proj", ("norm1", "norm2"), ("mlp.fc1", "mlp.fc2"))
    text_block = _block(text.heads, "attn.in_proj_{}", "attn.out_proj", ("ln_1", "ln_2"), ("mlp.c_fc", "mlp.c_proj"))
    return [
        *_pair("img/embedding", "visual.trunk.patch_embed.proj", PATCHES),
        same("img/pos_embedding", "visual.trunk.pos_embed"),
        *layers(image.layers, "img/Transformer/encoderblock_{}/", "visual.trunk.blocks.{}.", image_block),
        *_norm("img/Transformer/encoder_norm", "visual.trunk.norm"),
        *below("img/MAPHead_0/", "visual.trunk.attn_pool.", _head(image.heads)),
        same("txt/Embed_0/embedding", "text.token_embedding.weight"),
        same("txt/pos_embedding", "text.positional_embedding", NO_LEADING_ONE),
        *layers(text.layers, "txt/Encoder_0/encoderblock_{}/", "text.transformer.resblocks.{}.", text_block),
        *_norm("txt/Encoder_0/encoder_norm", "text.ln_final"),
        *_pair("txt/head", "text.text_projection"),
        same("t", "logit_scale", SCALAR),
        same("b", "logit_bias", SCALAR),
    ]
