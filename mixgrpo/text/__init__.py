"""Text embeddings made in advance: encoded once, stored, read while training."""
