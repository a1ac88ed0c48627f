"""The usearch index."""
