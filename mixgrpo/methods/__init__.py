"""How a rollout is learned from: one file per family of methods."""
