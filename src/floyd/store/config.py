"""Frozen configurations that keep what they do not understand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class Config(Mapping[str, Any]):
    """One component's configuration: the keys of its JSON file are the fields of the dataclass.

    Keys that floyd does not know (`foreign`) are kept and written back: a scheduler's `lambda_min_clipped` must
    survive a load and a save even where no field of ours bears that name. Subclasses refuse, in `__post_init__`,
    a known key whose value they cannot honour.
    """

    foreign: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def known_keys(cls) -> tuple[str, ...]:
        return tuple(f.name for f in fields(cls) if f.name != "foreign")

    @classmethod
    def from_json(cls, mapping: Mapping[str, Any], **overrides: Any) -> Self:
        given = {**mapping, **overrides}
        known = {key: _frozen(given.pop(key)) for key in cls.known_keys() if key in given}
        return cls(**known, foreign=given)

    def to_json(self) -> dict[str, Any]:
        """Known and foreign keys together, with tuples as lists: what belongs in the JSON file."""
        return {key: _thawed(value) for key, value in {**self.foreign, **self._known()}.items()}

    def _known(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in self.known_keys()}

    def __getitem__(self, key: str) -> Any:
        return {**self.foreign, **self._known()}[key]

    def __getattr__(self, key: str) -> Any:
        if key != "foreign" and key in self.foreign:
            return self.foreign[key]
        raise AttributeError(f"{type(self).__name__} has no key {key!r}.")

    def __iter__(self) -> Iterator[str]:
        return iter({**self.foreign, **self._known()})

    def __len__(self) -> int:
        return len({**self.foreign, **self._known()})


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value


def _thawed(value: Any) -> Any:
    return [_thawed(item) for item in value] if isinstance(value, list | tuple) else value
