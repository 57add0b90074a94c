"""Tensors of Transformers' ``CLIPModel`` and ``SiglipModel`` <-> OpenCLIP's; ``huggingface_config.py`` has the rest.

SigLIP 2's checkpoints of a fixed resolution are ``SiglipModel`` too.
"""

from clip_jax.errors import UserError
from clip_jax.interop import open_clip, rename
from clip_jax.interop.open_clip import TOWERS
from clip_jax.interop.rename import LEADING_ONE, SCALAR, TRANSPOSED, Rule, below, both, layers, same
from clip_jax.interop.tensors import Tensors
from clip_jax.models.clip import Architecture
from clip_jax.models.vit import ImageTower


def ignored(name: str) -> bool:
    """Old versions of Transformers saved the positions 0, 1, 2, ... with the weights."""
    return name.endswith("embeddings.position_ids")


def to_open_clip(tensors: Tensors, architecture: Architecture, towers: tuple[str, ...] = TOWERS) -> Tensors:
    """Transformers' tensors under OpenCLIP's names; only those of the tower if there is one tower."""
    rules = [rule for rule in _rules(architecture) if open_clip.needed(rule.open_clip[0], towers)]
    return rename.to_open_clip(tensors, rules, ignored)


def from_open_clip(tensors: Tensors, architecture: Architecture) -> Tensors:
    """OpenCLIP's tensors under Transformers' names."""
    return rename.from_open_clip(tensors, _rules(architecture))


def is_siglip(architecture: Architecture) -> bool:
    """Whether Transformers has this as its SiglipModel (True) or its CLIPModel (False). UserError for neither."""
    image, text = architecture.image, architecture.text
    if isinstance(image, ImageTower):
        if image.pooling == "attention" and not image.class_token and text.pooling == "last" and text.projection_bias:
            return True
        plain = image.pooling == "class" and image.norm_pre and not image.patch_bias and image.layer_scale is None
        if plain and text.causal and text.projection and text.pooling in ("argmax", "eos"):
            return False
    raise UserError("this architecture is neither Transformers' CLIPModel nor its SiglipModel; use --format=openclip")


def _block(fused: str, attention_out: str, norms: tuple[str, str], mlp: tuple[str, str]) -> list[Rule]:
    return [
        *both("layer_norm1", norms[0]),
        *(
            Rule(tuple(f"self_attn.{x}_proj.{kind}" for x in "qkv"), (fused.format(kind),))
            for kind in ("weight", "bias")
        ),
        *both("self_attn.out_proj", attention_out),
        *both("layer_norm2", norms[1]),
        *both("mlp.fc1", mlp[0]),
        *both("mlp.fc2", mlp[1]),
    ]


BLOCK = _block("attn.in_proj_{}", "attn.out_proj", ("ln_1", "ln_2"), ("mlp.c_fc", "mlp.c_proj"))
TIMM_BLOCK = _block("attn.qkv.{}", "attn.proj", ("norm1", "norm2"), ("mlp.fc1", "mlp.fc2"))

CLIP_IMAGE = (
    same("embeddings.class_embedding", "class_embedding"),
    same("embeddings.patch_embedding.weight", "conv1.weight"),
    same("embeddings.position_embedding.weight", "positional_embedding"),
    *both("pre_layrnorm", "ln_pre"),  # Transformers' spelling
    *both("post_layernorm", "ln_post"),
)

SIGLIP_IMAGE = (
    *both("embeddings.patch_embedding", "patch_embed.proj"),
    same("embeddings.position_embedding.weight", "pos_embed", LEADING_ONE),
    *both("post_layernorm", "norm"),
    same("head.probe", "attn_pool.latent"),
    *(
        Rule((f"head.attention.in_proj_{kind}",), (f"attn_pool.q.{kind}", f"attn_pool.kv.{kind}"), parts=(1, 2))
        for kind in ("weight", "bias")
    ),
    *both("head.attention.out_proj", "attn_pool.proj"),
    *both("head.layernorm", "attn_pool.norm"),
    *both("head.mlp.fc1", "attn_pool.mlp.fc1"),
    *both("head.mlp.fc2", "attn_pool.mlp.fc2"),
)

TEXT = (
    same("embeddings.token_embedding.weight", "token_embedding.weight"),
    same("embeddings.position_embedding.weight", "positional_embedding"),
    *both("final_layer_norm", "ln_final"),
)


def _rules(architecture: Architecture) -> list[Rule]:
    return (_siglip if is_siglip(architecture) else _clip)(architecture.image.layers, architecture.text.layers)


def _clip(image_layers: int, text_layers: int) -> list[Rule]:
    return [
        *below("vision_model.", "visual.", CLIP_IMAGE),
        *layers(image_layers, "vision_model.encoder.layers.{}.", "visual.transformer.resblocks.{}.", BLOCK),
        same("visual_projection.weight", "visual.proj", TRANSPOSED),
        *below("text_model.", "", TEXT),
        *layers(text_layers, "text_model.encoder.layers.{}.", "transformer.resblocks.{}.", BLOCK),
        same("text_projection.weight", "text_projection", TRANSPOSED),
        same("logit_scale", "logit_scale"),
    ]


def _siglip(image_layers: int, text_layers: int) -> list[Rule]:
    return [
        *below("vision_model.", "visual.trunk.", SIGLIP_IMAGE),
        *layers(image_layers, "vision_model.encoder.layers.{}.", "visual.trunk.blocks.{}.", TIMM_BLOCK),
        *below("text_model.", "text.", TEXT),
        *layers(text_layers, "text_model.encoder.layers.{}.", "text.transformer.resblocks.{}.", BLOCK),
        *both("text_model.head", "text.text_projection"),
        same("logit_scale", "logit_scale", SCALAR),
        same("logit_bias", "logit_bias", SCALAR),
    ]
