"""Runs as HTML pages, comparisons and studies. Only the commands import this."""
