"""Estimates of a run's cost before it starts: memory per GPU, model evaluations, time."""
