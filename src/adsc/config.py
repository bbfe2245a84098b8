"""The saved form of a reduction: ``adsc_config.json`` beside a checkpoint."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from .errors import InputError
from .planning import PATTERNS
from .schedule import Schedule, fraction

FILE_NAME = "adsc_config.json"
VERSION = 1
POSITIONS = ("original", "compact")


@dataclass(frozen=True)
class ADSCConfig:
    """How a model's vision tokens are reduced.

    Parameters
    ----------
    schedule
        Where and how much (a schedule, or its text).
    pattern
        Which tokens of a span stay (see :func:`adsc.plan`).
    positions
        ``original``: kept tokens keep their position ids; ``compact``: the survivors of each stage are renumbered.
    seed
        Seed of the pattern ``random``.
    budgets
        The schedules that a model was trained with, by budget: a mapping or pairs, kept as pairs of fraction and
        schedule, the largest budget first. :meth:`for_budget` takes them where there is one.

    Raises
    ------
    InputError
        For an unknown pattern or positions, a schedule that does not parse, or a budget that is given twice or lies
        outside (0, 1].
    """

    schedule: Schedule
    pattern: str = "last"
    positions: str = "original"
    seed: int = 0
    budgets: tuple[tuple[Fraction, Schedule], ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.schedule, str):
            object.__setattr__(self, "schedule", Schedule.parse(self.schedule))
        if not isinstance(self.schedule, Schedule):
            raise InputError(f"schedule {self.schedule!r} is not a schedule; write it like '3:1/2,11:1/2'")
        if self.pattern not in PATTERNS:
            raise InputError(f"pattern {self.pattern!r} is unknown; choose one of {', '.join(PATTERNS)}")
        if self.positions not in POSITIONS:
            raise InputError(f"positions {self.positions!r} is unknown; choose one of {', '.join(POSITIONS)}")
        if type(self.seed) is not int or self.seed < 0:
            raise InputError(f"seed {self.seed!r} must be a whole number of at least 0")
        object.__setattr__(self, "budgets", _budgets(self.budgets))

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON values, with type tag and version."""
        values: dict[str, Any] = {
            "type": "adsc",
            "version": VERSION,
            "schedule": str(self.schedule),
            "pattern": self.pattern,
            "positions": self.positions,
            "seed": self.seed,
        }
        if self.budgets:  # left out otherwise: versions that do not know it warn of it
            values["budgets"] = {str(retained): str(schedule) for retained, schedule in self.budgets}
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ADSCConfig:
        """The inverse of :meth:`to_dict`. Of a newer version's, what this one knows is read, with a warning.

        Raises
        ------
        InputError
            When the type tag is not ``adsc``, the schedule is missing, or a value is not valid.
        """
        if not isinstance(values, dict) or values.get("type") != "adsc":
            raise InputError('not an adsc config; it must be a JSON object with "type": "adsc"')
        version = values.get("version", VERSION)
        if type(version) is not int or version < 1:
            raise InputError(f"version {version!r} of the adsc config must be a whole number of at least 1")
        if not isinstance(values.get("schedule"), str):
            raise InputError('the adsc config has no schedule; write it as text, like "schedule": "3:1/2,11:1/2"')
        known = {"schedule", "pattern", "positions", "seed", "budgets"}
        unknown = sorted(values.keys() - known - {"type", "version"})
        if unknown:
            warnings.warn(
                f"the adsc config of version {version} has keys unknown to version {VERSION}, "
                f"which are ignored: {', '.join(unknown)}",
                stacklevel=2,
            )
        elif version > VERSION:
            warnings.warn(
                f"the adsc config is of version {version}, newer than this adsc knows ({VERSION}); update adsc",
                stacklevel=2,
            )
        try:
            return cls(**{key: value for key, value in values.items() if key in known})
        except InputError as error:
            if version <= VERSION:
                raise
            raise InputError(f"{error}; or update adsc: the config is of version {version}") from None

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``adsc_config.json`` into ``folder`` (made if need be), all of it or nothing, and return its path."""
        path = Path(folder) / FILE_NAME
        if path.parent.exists() and not path.parent.is_dir():
            raise InputError(f"{path.parent} is a file; give a folder to save the config in")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{FILE_NAME}.{os.getpid()}")
        temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
        return path

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str | os.PathLike[str]) -> ADSCConfig:
        """Read the config of a folder or, when there is no such folder, of a repository on the Hugging Face hub.

        Raises
        ------
        InputError
            When there is no config, or it is not valid.
        """
        path = Path(folder_or_hub_id) / FILE_NAME
        if not path.parent.is_dir():
            path = _from_hub(str(folder_or_hub_id))
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path.parent} has no {FILE_NAME}; save one with ADSCConfig.save_pretrained") from None
        except ValueError as error:
            raise InputError(f"{path} is not valid JSON: {error}") from None
        return cls.from_dict(values)


def _budgets(given: object) -> tuple[tuple[Fraction, Schedule], ...]:
    """Budgets and their schedules, the largest first, from a mapping or pairs."""
    pairs: Any = given.items() if isinstance(given, Mapping) else given
    if not isinstance(pairs, Iterable) or isinstance(pairs, str):
        raise InputError(f'budgets {given!r} is not a mapping; write it like {{"1/3": "3:1/2,11:1/2"}}')
    read: dict[Fraction, Schedule] = {}
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2:
            raise InputError(f"{pair!r} of budgets is not a budget with its schedule")
        retained, schedule = fraction(pair[0], "budget"), pair[1]
        if isinstance(schedule, str):
            schedule = Schedule.parse(schedule)
        if not isinstance(schedule, Schedule):
            raise InputError(f"the schedule {schedule!r} of budget {retained} is not one; write it like '3:1/2,11:1/2'")
        if retained in read:
            raise InputError(f"budget {retained} is given twice; give one schedule for each budget")
        if (retained == 1) != (len(schedule) == 0):
            raise InputError(
                f"budget {retained} has the schedule {str(schedule)!r}; budget 1 is the dense model, whose schedule "
                "is empty, and no other has an empty one"
            )
        read[retained] = schedule
    return tuple(sorted(read.items(), key=lambda pair: pair[0], reverse=True))


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, FILE_NAME))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"no folder {name!r}, and the hub gave no {FILE_NAME} for it: {reason}") from None
