"""One line for a package that is missing, before the first import of it fails with a trace, or fails after training.

`envs` imports this first. A script of ours (its module has `Args`) ends with that line, a library gets an ImportError;
only scripts need the packages of the command line and of the curve.
"""

import sys
from importlib.util import find_spec

EVERYWHERE = ("numpy", "gymnasium", "mujoco", "PIL")
IN_SCRIPTS = ("tyro", "tqdm", "matplotlib")


def is_installed(name: str) -> bool:
    """Whether a package could be imported, as far as can be seen without doing so."""
    if sys.modules.get(name):
        return True
    try:
        return find_spec(name) is not None
    except ImportError:
        return False


is_script = hasattr(sys.modules.get("__main__"), "Args")
for name in EVERYWHERE + (IN_SCRIPTS if is_script else ()):
    if not is_installed(name):
        kind = SystemExit if is_script else ImportError
        raise kind(f"{name} is not installed: pip install -r requirements.txt")
