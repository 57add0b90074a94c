"""Captions to token ids: the tokenizers of CLIP, SigLIP and CLIPA, and ones trained on the user's captions.

``clip``, ``siglip``, ``wordpiece`` and ``sentencepiece`` each build a ``Tokenizer``: a function from texts to
``int32[n, context_length]``. A library always splits a text into tokens (Rust ``tokenizers``, C++
``sentencepiece``); the code here repairs the text before that, and adds start, end and padding after it.
"""

from functools import partial

from clip_jax.data.tokenizers import files, hub
from clip_jax.data.tokenizers.byte_pairs import clip
from clip_jax.data.tokenizers.sentence_pieces import sentencepiece, siglip, train_sentencepiece
from clip_jax.data.tokenizers.tokenizer import Tokenizer
from clip_jax.data.tokenizers.word_pieces import wordpiece

__all__ = ["KINDS", "Tokenizer", "clip", "files", "hub", "sentencepiece", "siglip", "train_sentencepiece", "wordpiece"]

KINDS = {
    "clip": clip,
    "clipa": wordpiece,
    "siglip": siglip,
    "siglip2": partial(siglip, version=2),
    "sentencepiece": sentencepiece,
}
"""The tokenizer kinds of presets: each builds a ``Tokenizer`` from its file and a context length."""
