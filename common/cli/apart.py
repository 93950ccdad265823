"""What the server of rows imports first: it gets a process group of its own.

A signal to the group of the command, as schedulers send it, would end the server at once. Its rows
would then be thought dead and be left running.
"""

import os
import sys

if sys.argv[0] == "-c":  # as the server is started
    os.setpgid(0, 0)
