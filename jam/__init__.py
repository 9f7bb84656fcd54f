"""jam: fuse an autoregressive image-text model with a text LLM, train the result, talk to it in text and images."""

__version__ = "0.1.0"
