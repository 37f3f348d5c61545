"""Inference, metrics, the final exam, figures and cost of one run."""
