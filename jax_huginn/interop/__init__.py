"""Weights in other layouts: names, the `.pth` of the public training code, Hugging Face folders."""
