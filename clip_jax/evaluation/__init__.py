"""What a model is worth: functions over embeddings, and a runner that takes tower functions."""
