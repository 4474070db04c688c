"""The dense model: finding it, knowing it without its weights, reading them."""
