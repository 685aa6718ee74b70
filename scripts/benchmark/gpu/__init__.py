"""What one GPU can do: parts that prove and measure, each in a process of its own.

``python -m gpu`` (by ``scripts/benchmark/gpu.sh``) runs them; ``parts.py`` lists them.
"""
