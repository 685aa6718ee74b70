"""Independent paths from pictures to the published rewards' scores: the libraries' own code.

Nothing here uses mixgrpo. Every oracle takes PIL images and their texts, and returns [B] float32.
"""
