"""What an opened model is worth: text, perplexity, divergence from the dense model, speed."""
