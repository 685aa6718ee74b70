"""Downloads from Hugging Face of what a run on a published model needs."""
