"""What floyd raises beyond ValueError and TypeError, so that a caller can catch it.

FloydError
├── ConfigError (ValueError)         a configuration asks for what floyd cannot honour
├── EngineError (RuntimeError)       a faster engine cannot be built here, or not for this network
├── SafetyError                      the safety checker objects to a picture, or could not look at it
└── CheckpointError (OSError)        a checkpoint's files are missing, broken or of another shape
    └── DownloadError                the files are on the hub and could not be fetched
"""

from __future__ import annotations


class FloydError(Exception):
    """The root: catch this to catch everything that floyd itself raises."""


class ConfigError(FloydError, ValueError):
    """A configuration asks for something that floyd cannot honour."""


class EngineError(FloydError, RuntimeError):
    """An engine cannot run on this machine, or not this network; floyd without it can."""


class SafetyError(FloydError):
    """A picture is not handed out: the safety checker objects to it, or could not look at it."""

    def __init__(
        self,
        message: str,
        *,
        nsfw_scores: list[float] | None = None,
        watermark_scores: list[float] | None = None,
    ) -> None:
        super().__init__(message)
        self.nsfw_scores = nsfw_scores  # of every picture of the call; None: there are none
        self.watermark_scores = watermark_scores


class CheckpointError(FloydError, OSError):
    """A checkpoint's files are missing, broken, or do not fit the model."""


class DownloadError(CheckpointError):
    """A checkpoint's files could not be fetched from the hub."""
