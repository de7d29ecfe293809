"""Everything about a run folder and its checkpoints: save, load, verify, import, start from others' weights."""
