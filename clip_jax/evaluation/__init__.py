"""Evaluation of a model: embeds a source with both towers, then computes retrieval and zero-shot metrics."""
