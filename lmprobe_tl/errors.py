"""Everything that lmprobe_tl raises or warns of.

LmprobeError
|- InputError (ValueError)                 an argument that cannot be used as given
|   |- CalibrationError                    a threshold that cannot be set as asked: too few sequences, too little recall
|   |- EmptyMaskError                      rows without a token that counts
|   |- PromptTooLongError                  prompts beyond the model's context
|   `- UnknownHookPointError (KeyError)    a hook point that the model does not have
|- NonlinearClassifierError (TypeError)    a classifier of no kind of probe, with no linear rule: it cannot be saved
|- ProbeFileError (ValueError)             a probe file that cannot be read or written
|- StoreError (ValueError)                 an activation store that is damaged, incomplete, or of other data
|- IncompatibleProbeError (ValueError)     a probe that cannot score this model
|- EngineError (RuntimeError)              a serving engine that cannot run probes as it is set up, or its version
`- MonitorError (RuntimeError)             live scores, or changes, that would be missing or wrong
    `- ProbeNeverFiredError                a probe whose hook points saw no activation

LmprobeWarning (UserWarning)
|- NothingChangedWarning                   steering or ablation that left every activation as it was
|- CalibrationWarning                      a threshold whose guarantee hangs on the last digits of the scores
|- PoolingMismatchWarning                  trained on one pooling, used with another
`- ModelMismatchWarning                    a probe file made with another model or tokenizer
"""


class LmprobeError(Exception):
    """Base class of all errors that lmprobe_tl raises on purpose."""


class InputError(LmprobeError, ValueError):
    """An argument that cannot be used as given."""


class CalibrationError(InputError):
    """A threshold that cannot be set as asked: too few sequences, scores that are not finite, or too little recall."""


class EmptyMaskError(InputError):
    """Rows without a single token that counts; `rows` names them."""

    def __init__(self, message: str, rows: list[int]) -> None:
        super().__init__(message)
        self.rows = rows


class PromptTooLongError(InputError):
    """Prompts with more tokens than the model's context or `max_length`; `rows` names them."""

    def __init__(self, message: str, rows: list[int]) -> None:
        super().__init__(message)
        self.rows = rows


class UnknownHookPointError(InputError, KeyError):
    """A hook point that the model does not have."""

    def __str__(self) -> str:
        return Exception.__str__(self)  # KeyError would show the repr, quotes and all


class NonlinearClassifierError(LmprobeError, TypeError):
    """A classifier that is of no kind of probe, and whose decision is no linear function of the activations."""


class ProbeFileError(LmprobeError, ValueError):
    """A probe file that is damaged, of another format or version, or cannot be written."""


class StoreError(LmprobeError, ValueError):
    """An activation store that is damaged or incomplete, or that holds something else than was asked for."""


class IncompatibleProbeError(LmprobeError, ValueError):
    """A probe that cannot score this model: another width, layer count, or residual basis."""


class EngineError(LmprobeError, RuntimeError):
    """A serving engine that cannot run probes: a version, a model or a setting that is not supported."""


class MonitorError(LmprobeError, RuntimeError):
    """Live scores, or changes of activations, that would be missing or wrong."""


class ProbeNeverFiredError(MonitorError):
    """A probe whose hook points saw no activation while it was attached."""


class LmprobeWarning(UserWarning):
    """Base class of all warnings of lmprobe_tl."""


class CalibrationWarning(LmprobeWarning):
    """A threshold whose guarantee hangs on the last digits of the scores."""


class NothingChangedWarning(LmprobeWarning):
    """Steering or ablation that left every activation as it was."""


class PoolingMismatchWarning(LmprobeWarning):
    """Trained on one pooling, used with another."""


class ModelMismatchWarning(LmprobeWarning):
    """A probe file made with another model or tokenizer."""
