"""The model: blocks, Mixture of Experts, recurrence, and MoE-Huginn as a whole."""
