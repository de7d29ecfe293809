"""Generation: a cache of keys and values by recurrence, exits by row and token, sampling. Knows token ids only."""
