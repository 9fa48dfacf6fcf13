"""Text sources, the corpora made from them, and their chunks as token ids."""
