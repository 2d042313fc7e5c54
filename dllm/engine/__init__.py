"""The fast path of sampling: what of the past is computed again, and where its keys and values lie."""
