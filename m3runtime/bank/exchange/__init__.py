"""Banks as files for other programs: references with places and embeddings, as JSON lines and Parquet."""
