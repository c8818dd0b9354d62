"""The classifier: what guides need (``guide``), the learned one (``heads``), its losses, the stores that it learns from, and ``fit``."""
