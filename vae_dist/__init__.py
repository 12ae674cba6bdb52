"""A trainer for variational autoencoders whose runs are pure functions of their config and step."""

__version__ = "0.1.0"
