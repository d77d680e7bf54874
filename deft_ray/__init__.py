"""Search for the accuracy-density front of adapter fine-tuning with a density loss."""

__version__ = "0.1.0"
