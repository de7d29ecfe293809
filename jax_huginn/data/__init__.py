"""Data: files and their split (`sources`), the order (`streams`), tokens (`tokenizer`), batches (`pipeline`)."""
