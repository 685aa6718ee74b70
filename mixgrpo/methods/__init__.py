"""The policy update: how the policy is trained on a rollout, one file per family of methods."""
