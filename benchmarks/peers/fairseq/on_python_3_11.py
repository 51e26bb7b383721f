"""Import it before fairseq 0.12.2, which Python 3.11 would else refuse.

fairseq and hydra 1.0 give fields of dataclasses other dataclasses as defaults. Python 3.11 takes
these for mutable, since they have no hash, and stops. Here they get the hash of any object.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

_dataclass = dataclasses.dataclass


def _with_hashable_defaults(cls: type | None = None, /, **options: Any) -> Any:
    if cls is None:
        return _decorator(options)
    for value in vars(cls).values():
        default = value.default if isinstance(value, dataclasses.Field) else value
        if dataclasses.is_dataclass(default) and type(default).__hash__ is None:
            type(default).__hash__ = object.__hash__  # type: ignore[method-assign] # that is the point
    return _dataclass(cls, **options)


def _decorator(options: dict[str, Any]) -> Callable[[type], Any]:
    return lambda cls: _with_hashable_defaults(cls, **options)


dataclasses.dataclass = _with_hashable_defaults
