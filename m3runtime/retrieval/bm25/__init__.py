"""BM25 over words, in numpy."""
