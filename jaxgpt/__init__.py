"""jaxgpt: a Transformer library that you can read in an afternoon and train anywhere JAX runs."""

__version__ = "0.1.0"
