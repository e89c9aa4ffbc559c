"""Errors of reading and writing checkpoints."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as what it says it is. Names the file and tensor, and what is accepted."""


class Unsupported(CheckpointError):
    """A well-formed checkpoint, or layer, that our kernels or a container cannot hold."""
