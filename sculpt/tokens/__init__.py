"""The family of language models: sequences of tokens, whose log-density is known at every prefix."""
