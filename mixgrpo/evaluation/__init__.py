"""Rewards of many pictures, of several models side by side."""
