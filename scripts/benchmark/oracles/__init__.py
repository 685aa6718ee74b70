"""Independent implementations of the published rewards, from images to scores.

Nothing here uses mixgrpo. Every oracle takes PIL images and their texts, and returns [B] float32.
"""
