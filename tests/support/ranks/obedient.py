#!/usr/bin/env python
"""Stands in for the interpreter that starts ranks: a rank that counts, and stops at a signal as training does.

Usage, as for a rank: obedient.py -P -m convneur.launch FOLDER [deaf]
"""

import os
import signal
import sys
import time
from pathlib import Path

from convneur.launch import leash
from convneur.launch.lock import held_lock

leash.tie()
folder, deaf = Path(sys.argv[4]), "deaf" in sys.argv
leash.keep(held_lock(folder))
received: list[int] = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
    signal.signal(number, lambda number, _: received.append(number))
count = folder / f"count-{os.environ['RANK']}"
steps = 0
while deaf or not received:
    steps += 1
    count.with_suffix(".tmp").write_text(f"{steps} {os.getpid()}")
    count.with_suffix(".tmp").replace(count)
    time.sleep(0.02)
(folder / f"saved-{os.environ['RANK']}").write_text(signal.Signals(received[0]).name)
