"""Families of models; each brings a configuration, its models, its tokenizers and two front doors."""
