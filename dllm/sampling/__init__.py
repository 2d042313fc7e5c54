"""Sampling: one denoising loop, and what it asks: which candidate, how sure, which to commit."""
