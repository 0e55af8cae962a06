"""Data sets: download.py fetches the real ones, sample.py draws those that stand in for them."""
