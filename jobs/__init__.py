"""Entry points, for a shell or `ray job submit`: parse, one call, print."""

import gc
import signal
import sys

if sys.argv[0] == "-m":
    # Imports take seconds and there is nothing to clean up yet: Ctrl-C just ends, until `command.reported`.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()  # nothing is garbage yet, and looking for it took a fifth of them
