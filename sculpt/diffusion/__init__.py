"""Diffusion models: denoisers in canonical coordinates, their chains, and the networks of their classifiers."""
