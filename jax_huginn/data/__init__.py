"""Training data: files (`sources`) -> tokens (`tokenizer`) -> rows (`reader`) -> their order (`streams`) -> batches.

Rows can also be made as they are needed: `tasks`, `generated`. `rows` makes batches of either kind.
`pipeline` puts these together; `resume` saves and restores the exact position.
"""
