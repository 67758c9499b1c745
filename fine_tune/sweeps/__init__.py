"""Searching settings: a study whose trials are runs like any other."""
