"""Preparation in a process of its own, while training runs. It ends when training does."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict

from longfire.config import settings
from longfire.data.jobs import Job
from longfire.data.manifest import MANIFEST
from longfire.data.tokens import TokenStore
from longfire.errors import DataError

MODULE = "longfire.data.prepare"  # reads one line from its input: the settings, as JSON
POLL_SECONDS = 0.02


class BackgroundPreparation:
    """The process that fills the stores. `check` raises its errors here."""

    def __init__(self, data: settings.Data, tokenizer_settings: settings.Tokenizer) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULE],
            stdin=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )
        assert self._process.stdin is not None, "asked for by stdin=PIPE"
        self._input = self._process.stdin
        self._input.write(json.dumps([asdict(data), asdict(tokenizer_settings)]).encode() + b"\n")
        self._input.flush()

    def wait_for(self, jobs: Sequence[Job]) -> None:
        """Wait until every store can be opened. Raises DataError if the process ends before."""
        while not all((job.folder / MANIFEST).exists() for job in jobs):
            if self._process.poll() not in (None, 0):
                self._fail()
            time.sleep(POLL_SECONDS)

    def check(self, stores: Sequence[TokenStore]) -> None:
        """Raises DataError if the process has failed, or ended and left a store incomplete."""
        code = self._process.poll()
        if code is None:
            return
        if code != 0 or not all(TokenStore(store.folder).complete for store in stores):
            self._fail()

    def _fail(self) -> None:
        """Raise DataError with the last line that the process wrote."""
        self._errors.seek(0)
        reason = self._errors.read().strip().split("\n")[-1]
        if not reason:
            reason = f"it ended with code {self._process.returncode}"
        raise DataError(f"preparation in the background failed: {reason}")

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()
        self._input.close()
        self._errors.close()
