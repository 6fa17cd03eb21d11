"""Every error that a user can cause, in one tree.

    RecsysError
    ├── ConfigError        a setting is misspelt, of the wrong type or out of range
    ├── DataError          a log, a prepared data set or a batch is not what its schema says
    │   ├── SourceError    the raw files cannot be read: missing, unreadable, lacking columns
    │   └── QuarantineError  more of the log was refused than `max_quarantined` allows
    ├── TrainError         training cannot go on
    │   ├── SupersededError    the run was started anew elsewhere, and goes on there
    │   └── NonFiniteLossError  the loss is NaN or infinite; names the rows of the batch
    ├── CheckpointError    a checkpoint is torn, or was made for another schema
    ├── StoreError         a store of checkpoints does not answer; what it holds may be whole
    ├── BundleError        an exported bundle is damaged, or its parts do not agree
    ├── RegistryError      the registry does not answer, or lacks what was asked for
    ├── StateError         the users' state cannot be read or written
    ├── ServeError         the service cannot be started
    └── ClusterError       a Ray cluster does not answer, or cannot be started here

A message names the thing, its value, the limit and the way out. What only a bug in this
project can cause is an `assert`, not one of these.
"""


class RecsysError(Exception):
    """The root: a command-line job prints its message without a traceback and exits with 2."""


class ConfigError(RecsysError, ValueError):
    """A setting is misspelt, of the wrong type, or does not go with another."""


class DataError(RecsysError):
    """A log, a prepared data set or a batch is not what its schema says."""


class SourceError(DataError):
    """Raw files are missing, unreadable, or lack a column that the canonical log needs."""


class QuarantineError(DataError):
    """More rows or files were quarantined than the configuration allows."""


class TrainError(RecsysError):
    """Training cannot go on."""


class SupersededError(TrainError):
    """The run was started anew, and goes on there; these workers may write no more."""


class NonFiniteLossError(TrainError):
    """The loss of a batch is NaN or infinite; the message names the rows that made it."""


class CheckpointError(RecsysError):
    """A checkpoint is incomplete, or does not fit the model or schema it is loaded into."""


class StoreError(RecsysError):
    """A store of checkpoints does not answer; what it holds may be whole."""


class BundleError(RecsysError):
    """A bundle is incomplete or damaged, or what it is made of does not agree."""


class RegistryError(RecsysError):
    """The model registry cannot be reached, refuses, or does not have what was asked for."""


class StateError(RecsysError):
    """The users' state cannot be read or written: its server or its file does not answer."""


class ServeError(RecsysError):
    """The service cannot be started."""


class ClusterError(RecsysError):
    """The Ray cluster that is named does not answer, or none can be started on this machine."""
