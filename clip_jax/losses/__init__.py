"""Contrastive losses over the global batch: ``reference`` defines them, ``softmax`` and ``sigmoid`` run on a mesh."""
