"""Teachers: language models, or the data set itself, that write latents and paraphrases."""
