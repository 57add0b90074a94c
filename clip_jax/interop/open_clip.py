"""OpenCLIP's state dicts (and OpenAI's, which have the same names) <-> our parameter tree: pure functions of arrays.

Nothing is read from disk here. The tables below are the complete mapping; ``table.py`` applies them in both directions.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from clip_jax.errors import UserError
from clip_jax.interop import table
from clip_jax.interop.table import MATRIX, ROWS, SCALAR, VECTOR, Row, rows
from clip_jax.models.clip import CLIP, Architecture, Params
from clip_jax.models.resnet import ResNetTower
from clip_jax.models.text import TextTower
from clip_jax.models.vit import ImageTower

# Buffers and sizes that older files store with the weights; OpenCLIP drops them too.
IGNORED = ("attn_mask", "text.attn_mask", "input_resolution", "context_length", "vocab_size")

TOWERS = ("image", "text")
OF_BOTH = ("logit_", "text_decoder.")

STATISTICS = ("running_mean", "running_var")
COUNT = "num_batches_tracked"


def needed(name: str, towers: tuple[str, ...]) -> bool:
    """Whether a model of these towers has the tensor of this name. Scale, bias and decoder belong to both together."""
    if name.startswith(OF_BOTH):
        return towers == TOWERS
    return ("image" if name.startswith("visual.") else "text") in towers


def to_params(
    tensors: Mapping[str, np.ndarray],
    architecture: Architecture,
    put: Callable[[str, np.ndarray], Any] = lambda path, leaf: leaf,
    towers: tuple[str, ...] = TOWERS,
) -> Params:
    """OpenCLIP's tensors by name -> our tree, in float32; ``put`` as in ``table.read``.

    For a model with only one of the ``towers``, the tree has only that tower, and no scale.
    The names of the text tower may begin with ``text.``, as in OpenCLIP's CustomTextCLIP, or not. Raises UserError for
    a tensor that is missing, unknown or of a wrong shape.
    """
    names = [name for name in tensors if name not in IGNORED and not name.endswith((*STATISTICS, COUNT))]
    names = [name for name in names if towers == TOWERS or not name.startswith(OF_BOTH)]
    renamed = _Renamed(tensors, {_canonical(name, architecture): name for name in names})
    shapes = table.parameter_shapes(architecture)
    rows = [row for row in _table(architecture) if needed(row.theirs, towers)]
    return table.read(renamed, rows, shapes, _sizes(architecture), put)


def to_batch_stats(tensors: Mapping[str, np.ndarray], architecture: Architecture) -> Params:
    """The running statistics of batch norm among OpenCLIP's tensors; ``{}`` for a model without batch norm."""
    statistics = _statistics(architecture)
    if not statistics:
        return {}
    shapes = table.shapes_of(CLIP(architecture).init_batch_stats)
    renamed = _Renamed(tensors, {name: name for name in tensors if name.endswith(STATISTICS)})
    return table.read(renamed, statistics, shapes, {})


def from_params(params: Params, architecture: Architecture, batch_stats: Params | None = None) -> dict[str, np.ndarray]:
    """Our tree -> OpenCLIP's tensors by name, the exact inverse of ``to_params`` and ``to_batch_stats``.

    PyTorch's count of batches is written as zero: with a constant momentum nothing reads it.
    """
    tensors = table.write(params, _table(architecture), _sizes(architecture))
    if statistics := _statistics(architecture):
        if not batch_stats:
            raise UserError("a model with batch norm needs its batch_stats as well as its parameters")
        tensors |= table.write(batch_stats, statistics, {})
        norms = [name for name in tensors if name.endswith("running_mean")]
        tensors |= {name.replace("running_mean", COUNT): np.zeros((), np.int64) for name in norms}
    return tensors


class _Renamed(Mapping):
    """A mapping under other names; each tensor is read only when it is used."""

    def __init__(self, tensors: Mapping[str, Any], names: Mapping[str, str]):
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Any:
        return self._tensors[self._names[name]]

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _sizes(architecture: Architecture) -> dict[str, int]:
    patch = architecture.image.patch_size  # not used by the table of a ResNet
    return {"rgb": 3, "down": patch, "across": patch}


def is_timm(tower: ImageTower | ResNetTower) -> bool:
    """Whether OpenCLIP takes this tower from timm (SigLIP, EVA-02), where its tensors have timm's names.

    OpenCLIP's own ViT always has a class token, biased keys and patches without bias. Such a model is a CustomTextCLIP,
    whose text tensors have the prefix ``text.``.
    """
    return isinstance(tower, ImageTower) and (not tower.class_token or not tower.key_bias or tower.patch_bias)


def has_text_prefix(architecture: Architecture) -> bool:
    """Whether OpenCLIP's model is a CustomTextCLIP or a CoCa, whose text tensors have the prefix ``text.``."""
    return is_timm(architecture.image) or architecture.text.pooling == "class"


def _canonical(name: str, architecture: Architecture) -> str:
    """The name in ``_table`` of a tensor in a file."""
    if not has_text_prefix(architecture):
        return name.removeprefix("text.")
    text = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
    return f"text.{name}" if name.startswith(text) else name


def _norm(theirs: str, ours: str) -> tuple[tuple[str, str, str], ...]:
    return (f"{theirs}.weight", f"{ours}/scale", VECTOR), (f"{theirs}.bias", f"{ours}/bias", VECTOR)


BLOCK = (
    *_norm("ln_1", "norm_1"),
    ("attn.in_proj_weight", "attention/qkv", "(three heads dim) width -> width three heads dim"),
    ("attn.in_proj_bias", "attention/qkv_bias", "(three heads dim) -> three heads dim"),
    ("attn.out_proj.weight", "attention/out", "width (heads dim) -> heads dim width"),
    ("attn.out_proj.bias", "attention/out_bias", VECTOR),
    *_norm("ln_2", "norm_2"),
    ("mlp.c_fc.weight", "mlp/up", MATRIX),
    ("mlp.c_fc.bias", "mlp/up_bias", VECTOR),
    ("mlp.c_proj.weight", "mlp/down", MATRIX),
    ("mlp.c_proj.bias", "mlp/down_bias", VECTOR),
)

VIT = (
    ("conv1.weight", "patch_embedding", "width rgb down across -> (down across rgb) width"),
    ("class_embedding", "class_embedding", VECTOR),
    ("positional_embedding", "position_embedding", ROWS),
    ("proj", "projection", ROWS),
)
VIT_NORM = _norm("ln_post", "norm_post")

# CoCa: PyTorch's attention has one matrix where all inputs are equally wide, and three where they are not.
ONE_MATRIX = (("in_proj_weight", "qkv", "(three heads dim) width -> width three heads dim"),)
THREE_MATRICES = (
    ("q_proj_weight", "query", "(heads dim) width -> width heads dim"),
    ("k_proj_weight", "key_value", "(heads dim) width -> width part heads dim", 0),
    ("v_proj_weight", "key_value", "(heads dim) width -> width part heads dim", 1),
)
CROSS = (
    ("in_proj_bias", "qkv_bias", "(three heads dim) -> three heads dim"),
    ("out_proj.weight", "out", "width (heads dim) -> heads dim width"),
    ("out_proj.bias", "out_bias", VECTOR),
)
QUERIES = (("query", "queries", ROWS), *_norm("ln_q", "norm_query"), *_norm("ln_k", "norm_key"))
CROSS_BLOCK = (
    *_norm("ln_1", "norm_cross"),
    *_norm("ln_1_kv", "norm_memory"),
    *_norm("ln_2", "norm_2"),
    ("mlp.c_fc.weight", "mlp/up", MATRIX),
    ("mlp.c_fc.bias", "mlp/up_bias", VECTOR),
    ("mlp.c_proj.weight", "mlp/down", MATRIX),
    ("mlp.c_proj.bias", "mlp/down_bias", VECTOR),
)
DECODER = (*_norm("ln_final", "norm_final"), ("text_projection", "projection", ROWS))

LAYER_SCALE = (("ls_1.gamma", "scale_1", VECTOR), ("ls_2.gamma", "scale_2", VECTOR))

TEXT = (
    ("token_embedding.weight", "token_embedding", ROWS),
    ("positional_embedding", "position_embedding", ROWS),
    *_norm("ln_final", "norm_final"),
)

PROJECTION = (("text_projection", "projection", ROWS),)
PROJECTION_WITH_BIAS = (
    ("text_projection.weight", "projection", MATRIX),
    ("text_projection.bias", "projection_bias", VECTOR),
)


def _table(architecture: Architecture) -> list[Row]:
    """Every tensor of an architecture."""
    return [
        *_image(architecture.image, architecture.embed_dim),
        *_text(architecture.text, "text." if has_text_prefix(architecture) else ""),
        *(() if architecture.decoder is None else _decoder()),
        Row("logit_scale", "logit_scale", SCALAR),
        *([] if architecture.init_logit_bias is None else [Row("logit_bias", "logit_bias", SCALAR)]),
    ]


def _image(tower: ImageTower | ResNetTower, embed_dim: int) -> list[Row]:
    if isinstance(tower, ResNetTower):
        return _resnet(tower)
    if is_timm(tower):
        return _timm(tower)
    block = BLOCK if tower.layer_scale is None else (*BLOCK, *LAYER_SCALE)
    return [
        *rows("visual.", "image/", *VIT),
        *(
            _query_pooling(tower.width == embed_dim)
            if tower.pooling == "queries"
            else rows("visual.", "image/", *VIT_NORM)
        ),
        *(rows("visual.", "image/", *_norm("ln_pre", "norm_pre")) if tower.norm_pre else ()),
        *rows("visual.transformer.resblocks.{layer}.", "image/transformer/blocks/", *block),
    ]


def _query_pooling(one_width: bool) -> list[Row]:
    matrices = ONE_MATRIX if one_width else THREE_MATRICES
    return [
        *rows("visual.attn_pool.", "image/query_pooling/", *QUERIES),
        *rows("visual.attn_pool.attn.", "image/query_pooling/attention/", *matrices, *CROSS),
        *rows("visual.", "image/query_pooling/", *VIT_NORM),
    ]


def _decoder() -> list[Row]:
    cross = "text_decoder.cross_attn.{layer}."
    return [
        *rows("text_decoder.resblocks.{layer}.", "decoder/blocks/text/", *BLOCK),
        *rows(cross, "decoder/blocks/", *CROSS_BLOCK),
        *rows(f"{cross}attn.", "decoder/blocks/cross/", *ONE_MATRIX, *CROSS),
        *rows("text_decoder.", "decoder/", *DECODER),
    ]


def _text(tower: TextTower, prefix: str) -> list[Row]:
    projection = PROJECTION_WITH_BIAS if tower.projection_bias else PROJECTION
    return [
        *rows(prefix, "text/", *TEXT),
        *(rows(prefix, "text/", *projection) if tower.projection else ()),
        *(rows(prefix, "text/", ("cls_emb", "class_embedding", VECTOR)) if tower.pooling == "class" else ()),
        *rows(f"{prefix}transformer.resblocks.{{layer}}.", "text/transformer/blocks/", *BLOCK),
    ]


def _linear(theirs: str, ours: str) -> tuple[tuple[str, str, str], ...]:
    return (f"{theirs}.weight", ours, MATRIX), (f"{theirs}.bias", f"{ours}_bias", VECTOR)


# timm's ViTs, as OpenCLIP uses them for SigLIP and EVA-02.
TIMM = (
    ("pos_embed", "position_embedding", "() rows features -> rows features"),
    ("patch_embed.proj.weight", "patch_embedding", "width rgb down across -> (down across rgb) width"),
    ("patch_embed.proj.bias", "patch_bias", VECTOR),
    *_norm("norm", "norm_post"),
)
TIMM_CLASS = (("cls_token", "class_embedding", "() () features -> features"),)
TIMM_BLOCK = (
    *_norm("norm1", "norm_1"),
    *_norm("norm2", "norm_2"),
    ("attn.proj.weight", "attention/out", "width (heads dim) -> heads dim width"),
    ("attn.proj.bias", "attention/out_bias", VECTOR),
    *_linear("mlp.fc2", "mlp/down"),
)
TIMM_MLP = _linear("mlp.fc1", "mlp/up")
TIMM_SWIGLU = (
    *_linear("mlp.fc1_g", "mlp/gate"),
    *_linear("mlp.fc1_x", "mlp/up"),
    *_norm("mlp.norm", "mlp/norm"),
    *_norm("attn.norm", "attention/norm"),
)
FUSED = (("attn.qkv.weight", "attention/qkv", "(three heads dim) width -> width three heads dim"),)
FUSED_BIAS = (("attn.qkv.bias", "attention/qkv_bias", "(three heads dim) -> three heads dim"),)
FUSED_BIASES = (  # the keys have no bias
    ("attn.q_bias", "attention/qkv_bias", "(heads dim) -> part heads dim", 0),
    ("attn.v_bias", "attention/qkv_bias", "(heads dim) -> part heads dim", 1),
)
SEPARATE = (
    ("attn.q_proj.weight", "attention/qkv", "(heads dim) width -> width part heads dim", 0),
    ("attn.k_proj.weight", "attention/qkv", "(heads dim) width -> width part heads dim", 1),
    ("attn.v_proj.weight", "attention/qkv", "(heads dim) width -> width part heads dim", 2),
    ("attn.q_proj.bias", "attention/qkv_bias", "(heads dim) -> part heads dim", 0),
    ("attn.v_proj.bias", "attention/qkv_bias", "(heads dim) -> part heads dim", 1),
)
TIMM_POOLING = (
    ("latent", "probe", "() () features -> features"),
    ("q.weight", "query", "(heads dim) width -> width heads dim"),
    ("q.bias", "query_bias", "(heads dim) -> heads dim"),
    ("kv.weight", "key_value", "(two heads dim) width -> width two heads dim"),
    ("kv.bias", "key_value_bias", "(two heads dim) -> two heads dim"),
    ("proj.weight", "out", "width (heads dim) -> heads dim width"),
    ("proj.bias", "out_bias", VECTOR),
    *_norm("norm", "norm"),
    *_linear("mlp.fc1", "mlp/up"),
    *_linear("mlp.fc2", "mlp/down"),
)
TIMM_HEAD = _linear("head", "projection")


def _timm(tower: ImageTower) -> list[Row]:
    if tower.swiglu:
        block = (*TIMM_BLOCK, *TIMM_SWIGLU, *SEPARATE)
    else:
        block = (*TIMM_BLOCK, *TIMM_MLP, *FUSED, *(FUSED_BIAS if tower.key_bias else FUSED_BIASES))
    pooling = tower.pooling == "attention"
    return [
        *rows("visual.trunk.", "image/", *TIMM, *(TIMM_CLASS if tower.class_token else ())),
        *rows("visual.trunk.blocks.{layer}.", "image/transformer/blocks/", *block),
        *(rows("visual.trunk.attn_pool.", "image/attention_pooling/", *TIMM_POOLING) if pooling else ()),
        *(rows("visual.trunk.", "image/", *TIMM_HEAD) if tower.projection else ()),
    ]


CONV = "out in down across -> down across in out"

RESNET_POOLING = (
    ("positional_embedding", "spatial_embedding", ROWS),
    *(
        (f"{n}_proj.weight", m, "(heads dim) width -> width heads dim")
        for n, m in (("q", "query"), ("k", "key"), ("v", "value"))
    ),
    *(
        (f"{n}_proj.bias", f"{m}_bias", "(heads dim) -> heads dim")
        for n, m in (("q", "query"), ("k", "key"), ("v", "value"))
    ),
    ("c_proj.weight", "out", "embed (heads dim) -> heads dim embed"),
    ("c_proj.bias", "out_bias", VECTOR),
)


def _convolutions(tower: ResNetTower) -> list[tuple[str, str, str, str]]:
    """Every convolution and the batch norm after it: (their convolution, their norm, our convolution, our norm)."""
    found = [(f"visual.conv{n}", f"visual.bn{n}", f"image/conv_{n}", f"image/norm_{n}") for n in (1, 2, 3)]
    for stage, blocks in enumerate(tower.stages, start=1):
        first, rest = (f"visual.layer{stage}.0.", f"image/stage_{stage}_first/"), []
        if blocks > 1:
            rest = [(f"visual.layer{stage}.{{layer+1}}.", f"image/stage_{stage}_rest/")]
        for theirs, ours in [first, *rest]:
            found += [(f"{theirs}conv{n}", f"{theirs}bn{n}", f"{ours}conv_{n}", f"{ours}norm_{n}") for n in (1, 2, 3)]
        theirs, ours = first
        found.append((f"{theirs}downsample.0", f"{theirs}downsample.1", f"{ours}conv_shortcut", f"{ours}norm_shortcut"))
    return found


def _resnet(tower: ResNetTower) -> list[Row]:
    found = rows("visual.attnpool.", "image/attention_pooling/", *RESNET_POOLING)
    for conv, norm, our_conv, our_norm in _convolutions(tower):
        found += [Row(f"{conv}.weight", f"{our_conv}/kernel", CONV), *rows("", "", *_norm(norm, our_norm))]
    return found


def _statistics(architecture: Architecture) -> list[Row]:
    tower = architecture.image
    if not isinstance(tower, ResNetTower):
        return []
    norms = [(norm, our_norm) for _, norm, _, our_norm in _convolutions(tower)]
    means = [Row(f"{norm}.running_mean", f"{our_norm}/mean", VECTOR) for norm, our_norm in norms]
    return means + [Row(f"{norm}.running_var", f"{our_norm}/variance", VECTOR) for norm, our_norm in norms]
