"""BoLT: learning from latent thoughts, as a data-versioned experiment (arXiv 2503.18866)."""
