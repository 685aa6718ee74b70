"""What a run on FLUX.1-dev needs, fetched from Hugging Face."""
