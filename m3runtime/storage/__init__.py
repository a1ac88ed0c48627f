"""Blocks in tiers: the contracts, the slab, the hierarchy, eviction and traces."""
