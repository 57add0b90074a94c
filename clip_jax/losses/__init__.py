"""Contrastive losses over the global batch: ``reference`` defines them, ``grid`` equals them on a mesh."""
