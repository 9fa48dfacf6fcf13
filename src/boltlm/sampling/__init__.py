"""A checkpoint and chunks become weighed latents: the E-step."""
