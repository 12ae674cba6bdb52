"""Output on the terminal: standard streams, exit codes, progress bars and tables."""
