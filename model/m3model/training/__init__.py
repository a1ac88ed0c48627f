"""Training a causal language model to read memories (Memory³, sections 3.6 and 4 to 6): what `m3 train` runs."""
