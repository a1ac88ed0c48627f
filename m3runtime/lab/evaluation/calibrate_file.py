"""`CalibratedFile`: the configuration file that ``m3 eval calibrate`` writes the chosen values of ``recall`` into."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date
from pathlib import Path

from m3runtime import assembly
from m3runtime.config import presets
from m3runtime.config.loading import PREFIX, LoadedConfig
from m3runtime.config.schema import Config
from m3runtime.lab.evaluation import yaml_edit
from m3runtime.lab.evaluation.calibrate import CalibrationSettings, calibrate, setting_of
from m3runtime.lab.evaluation.calibrate_report import calibrate_report, findings
from m3runtime.lab.evaluation.choosing import Setting
from m3runtime.lab.evaluation.journal import silent
from m3runtime.lab.evaluation.report import Report
from m3runtime.writing.writer import OnProgress


class CalibratedFile:
    """A configuration file whose ``recall.memories``, ``min_score`` and ``margin`` are chosen by measurement."""

    def __init__(self, loaded: LoadedConfig[Config], overrides: Mapping[str, str], *, dry_run: bool) -> None:
        """``overrides`` are those of ``loaded``. Raises `InputError` now if the file could not be changed later."""
        self.config = loaded.config
        self.path = loaded.file
        self._overrides = {key: text for key, text in overrides.items() if not key.startswith(yaml_edit.SECTION)}
        self._today = date.today().isoformat()
        former = setting_of(loaded.config)
        self._with(former, dict.fromkeys(asdict(former), self._today))
        if not dry_run:
            yaml_edit.check_writable(self.path)
        ours = (self.path.name, "default", presets.ORIGIN)
        origins = {key: loaded.origins[f"{yaml_edit.SECTION}.{key}"] for key in asdict(former)}
        self.overridden = {key: origin for key, origin in origins.items() if origin not in ours}
        """The keys whose values the file does not decide, and what does."""

    def calibrated(
        self, settings: CalibrationSettings, folder: Path, progress: OnProgress = silent
    ) -> tuple[Report, str]:
        """The report, and the file's new text with the evidence for each value; see `calibrate`."""
        results = calibrate(self.config, settings, folder, lambda: assembly.open_adapter(self.config), progress)
        found = findings(results, settings.seed)
        text = self._with(found.chosen, found.evidence(self._today))
        return calibrate_report(results, found, settings, self.config), text

    def _with(self, setting: Setting, evidence: Mapping[str, str]) -> str:
        return yaml_edit.edited(self.path, asdict(setting), evidence, self._load)

    def _load(self, copy: Path) -> Config:
        """A copy of the file with everything that takes precedence over it, except for ``recall``."""
        hidden = f"{PREFIX}{yaml_edit.SECTION.upper()}"
        environ = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        return Config.load(copy, environ, self._overrides)
