"""How well a model answers from memories: what stands behind ``m3 eval``."""
