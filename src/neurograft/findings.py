"""One thing that `check` noticed."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Severity = Literal["blocks", "risks", "notes"]


class Finding(BaseModel):
    """One thing that was noticed."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)
    severity: Severity
    """`blocks`: it must not be done; `risks`: it may go wrong; `notes`: good to know."""
    subject: str
    """What differs, such as `hidden_size`."""
    organ: Any = None
    recipient: Any = None
    why: str

    def sentence(self) -> str:
        """Return the finding in one sentence."""
        if self.organ is None and self.recipient is None:
            return f"{self.subject}: {self.why}"
        return f"{self.subject} is {self.organ} in the organ and {self.recipient} in the recipient: {self.why}"
