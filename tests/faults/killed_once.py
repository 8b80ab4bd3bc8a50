"""The command line, whose second process is killed at a step, but not again once torchrun has restarted it."""

import os
import signal
import sys
from pathlib import Path

from sfg_fast.cli import main
from sfg_fast.training.trainer import Trainer

if "KILLED_AT_STEP" in os.environ and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    step = Trainer._train_step

    def watched(self: Trainer) -> dict[str, float]:
        if self.step == int(os.environ["KILLED_AT_STEP"]):
            Path(os.environ["KILLED_MARK"]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)

    Trainer._train_step = watched  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main())
