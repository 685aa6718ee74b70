"""What a run takes, before it is run: memory on each GPU, model evaluations, time."""
