"""What a training step would cost on devices that need not be here: memory, traffic, seconds."""
