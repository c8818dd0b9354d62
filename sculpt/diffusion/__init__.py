"""Diffusion models as base models: adapter, schedule, classifier networks, samplers."""
