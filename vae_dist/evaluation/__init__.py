"""Metrics over a whole set of images, with their protocol."""
