"""Text becomes documents, documents become chunks of token ids."""
