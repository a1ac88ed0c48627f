"""The shape of a memory, its tensors, and the block that stores it."""
