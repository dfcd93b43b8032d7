"""Stands for the program of a job: counts to `steps` in the file `state`, and saves and leaves when it is stopped."""

import signal
import sys
import time
from pathlib import Path


def main() -> int:
    settings = dict(argument.split("=", 1) for argument in sys.argv[2:])
    state, steps = Path(settings["state"]), int(settings["steps"])
    stopped = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    first = int(state.read_text()) if state.exists() else 0
    print(f"starts at {first}", flush=True)
    for step in range(first, steps):
        print(f"step {step} of {steps}", flush=True)
        time.sleep(float(settings.get("seconds", "0.01")))
        if stopped:
            time.sleep(4.0)  # longer than Ray waits by default before it kills
            state.write_text(str(step + 1))
            print(f"saved {step + 1}", flush=True)
            return 75
    return int(settings.get("exit", "0"))


sys.exit(main())
