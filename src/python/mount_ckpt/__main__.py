"""``python -m mount_ckpt`` runs the command ``mount-ckpt`` with the same arguments."""

import os
import sys

from ._command import Error, find_command

if __name__ == "__main__":
    try:
        os.execv(find_command(), ["mount-ckpt", *sys.argv[1:]])
    except Error as error:
        sys.exit(f"mount-ckpt: {error}")
