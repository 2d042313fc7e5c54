"""LLaDA's models, registered with transformers' Auto classes when they are imported."""
