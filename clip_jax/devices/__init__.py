"""The devices: meshes and shardings, chips and slices, flags of XLA."""
