"""Chains that write their samples action by action: whatever needs no more than a list of actions and their probabilities."""
