"""What an examination of one component of this machine has found."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "missing", "broken", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One component.

    Attributes:
        group: what it belongs to.
        name: its name.
        status: "ok"; "missing"; "broken", where it is there but doesn't work; "wrong", where its name is another's.
        version: what is there, if anything.
        note: what is wrong and what that costs; empty where all is well.
        required: whether ConvNeur doesn't work without it.
    """

    group: str
    name: str
    status: Status
    version: str | None = None
    note: str = ""
    required: bool = False
