"""``sculpt demo``: the main jobs, each with its pictures and its table."""
