"""Downloads from Hugging Face of what a run on FLUX.1-dev needs."""
