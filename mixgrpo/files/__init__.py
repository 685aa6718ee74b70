"""Atomic writes, locks on folders, weight files, and fingerprints of files and code."""
