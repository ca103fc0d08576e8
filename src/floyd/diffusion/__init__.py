"""Tensor mathematics of diffusion: knows no network, no prompt and no file."""
