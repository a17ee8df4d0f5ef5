"""Short-video ranking from action sequences: A2Gen on TorchRec-sharded embedding tables."""

__version__ = "0.1.0"
