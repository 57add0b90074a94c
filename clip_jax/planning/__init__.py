"""What a run will need, read from its program before anything runs."""
