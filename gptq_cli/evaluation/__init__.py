"""Measuring a loaded model: its text, perplexity, divergence from the dense model, speed."""
