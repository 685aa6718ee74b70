"""The world of words: pictures of signs, their captions, an exact judge and a small Qwen-Image.

It is to Qwen-Image and the ``ocr`` reward what the Shapes world is to FLUX and its reward models: a
pipeline folder in diffusers' own format, trained here, with known ground truth.
"""
