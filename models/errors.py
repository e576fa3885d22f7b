"""What can be wrong with a checkpoint or a tokenizer, said so that the user can act on it."""


class ModelError(Exception):
    """Base of every error of `imprint.models`."""


class CheckpointError(ModelError):
    """A checkpoint folder cannot be used: the message names the file, key or tensor."""


class HubError(CheckpointError):
    """The Hugging Face Hub, or its cache here, does not give a checkpoint; the message says why."""


class KernelError(ModelError):
    """The kernels that were asked for cannot run here; the message says what to change."""
