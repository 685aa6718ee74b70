"""Image generation for test prompts with the base model, a tuned model, or a hybrid of both."""
