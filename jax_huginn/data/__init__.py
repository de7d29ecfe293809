"""Training data: files (`sources`) -> tokens (`tokenizer`) -> rows (`reader`) -> their order (`streams`) -> batches.

`pipeline` puts these together; `resume` saves and restores the exact position.
"""
