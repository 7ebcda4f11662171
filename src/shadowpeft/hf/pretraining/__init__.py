"""Pretraining a shadow alone, with the two ends of its base."""
