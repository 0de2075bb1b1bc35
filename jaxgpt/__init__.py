"""jaxgpt: a Transformer library to read in an afternoon and to train anywhere JAX runs."""

__version__ = "0.1.0"
