"""Evaluation: compares several models by the rewards of their images."""
