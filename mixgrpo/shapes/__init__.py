"""The Shapes world: captions, images, an exact judge and the training of its small checkpoints.

It replaces FLUX.1-dev, its prompts and its reward models where there is no GPU and no download,
with the same folder formats and the same code path, and with known ground truth.
"""
