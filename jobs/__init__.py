"""The job: what is to be done, who does it, what is done."""

__version__ = "0.1.0"
