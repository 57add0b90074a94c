"""What lasts: buckets, checkpoints, the run folder, and one way to replace a file atomically."""
