"""Data: the grammar of --dataset_args, sources, rows of ids, collators, and what is built in."""
