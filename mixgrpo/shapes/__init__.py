"""The Shapes world: captions, pictures, an exact judge and the training of its small checkpoints.

It stands in for FLUX.1-dev, its prompts and its reward models wherever there is no GPU and no
download: same folder formats, same code path, every true answer known.
"""
