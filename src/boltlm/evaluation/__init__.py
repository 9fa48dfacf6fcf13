"""A checkpoint becomes measures with standard errors."""
