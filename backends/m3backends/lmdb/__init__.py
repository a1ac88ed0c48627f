"""The LMDB home: blocks, references and embeddings in one transactional file."""
