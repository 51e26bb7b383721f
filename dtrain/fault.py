"""Faults on purpose, for tests: a rank is hit at a named point of a step.

`DTRAIN_FAULT="rank=1,step=7,point=after_backward,signal=KILL"`; several are separated by `;`.
`error=ENOSPC` raises that OSError instead of sending a signal. A rank or step that is not given
means any.
"""

import errno
import os
import signal

VARIABLE = "DTRAIN_FAULT"

POINTS = (
    "in_preparation",
    "before_backward",
    "after_backward",
    "before_optimizer",
    "after_optimizer",
    "in_validation",
    "in_save:staged",
    "in_save:begun",
    "in_save:model_written",
    "in_save:files_written",
    "in_save:manifest_written",
    "in_save:renamed",
    "before_prune",
    "in_prune",
)
"""Where a fault can be set, in the order in which a run passes them."""


def strike(point: str, step: int = 0) -> None:
    """Do what `DTRAIN_FAULT` asks for at this point of this step; usually nothing.

    Raises:
        OSError: if the fault is an `error`.
        ValueError: if `DTRAIN_FAULT` cannot be understood.
    """
    for fault in filter(None, os.environ.get(VARIABLE, "").split(";")):
        wanted = _parse(fault)
        here = {"point": point, "step": str(step), "rank": os.environ.get("RANK", "0")}
        if all(here[key] == wanted[key] for key in here if key in wanted):
            _hit(wanted)


def _parse(fault: str) -> dict[str, str]:
    fields = dict(field.strip().split("=", 1) for field in fault.split(","))
    known = {"rank", "step", "point", "signal", "error"}
    if not fields.keys() <= known or fields.get("point") not in POINTS:
        raise ValueError(f"{VARIABLE}={fault!r}: fields are {sorted(known)}, points {POINTS}")
    return fields


def _hit(wanted: dict[str, str]) -> None:
    if "error" in wanted:
        number = getattr(errno, wanted["error"])
        raise OSError(number, os.strerror(number))
    os.kill(os.getpid(), getattr(signal, f"SIG{wanted['signal']}"))
