"""Pictures of test prompts: from the base model, a tuned one, or first one and then the other."""
