"""Proofs that the JAX model and the PyTorch model are the same function."""
