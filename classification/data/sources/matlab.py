"""MATLAB files through scipy.io.loadmat, in a process of their own.

scipy 1.17 trusts the type numbers in a file: one changed byte makes it read where it should not, which ends the
process without a word. Here it ends a child, and the user is told which file is damaged.
"""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np

from classification.data.sources import checks
from erase_sd.common.errors import UserError

# Run by the child: argv is the file and the variables. A variable that is missing is left out, the others are written
# as .npy after a line with their name.
CHILD = """
import sys
import numpy as np
import scipy.io
path, *names = sys.argv[1:]
content = scipy.io.loadmat(path, variable_names=names)
for name in names:
    if name not in content:
        continue
    array = content[name]
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf":
        raise TypeError(f"its variable {name!r} is no array of real numbers")
    sys.stdout.buffer.write(name.encode() + b"\\n")
    np.save(sys.stdout.buffer, array, allow_pickle=False)
"""


def read(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return those of the named variables that the file has, arrays of real numbers.

    Raises UserError for a file that is damaged or of another format, and for a variable that holds anything else.
    """
    checks.library("scipy.io")
    child = subprocess.run([sys.executable, "-c", CHILD, str(path), *names], capture_output=True, check=False)
    if child.returncode != 0:
        reason = f"scipy ended with code {child.returncode}"
        said = child.stderr.decode(errors="replace").strip().splitlines()
        if child.returncode == 1 and said:
            reason = said[-1]
        raise UserError(f"{path} is damaged or no MATLAB 5 file ({reason}): get the original file again")
    arrays = {}
    stream = io.BytesIO(child.stdout)
    while name := stream.readline():
        arrays[name.decode().strip()] = np.load(stream, allow_pickle=False)
    return arrays
