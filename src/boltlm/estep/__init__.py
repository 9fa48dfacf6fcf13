"""The E-step: sample latents for the chunks of a corpus, weight them, and select one per chunk."""
