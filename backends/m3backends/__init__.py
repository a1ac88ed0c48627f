"""Tiers, indexes and embedders for m3runtime: one module for each outside system."""
