"""Runs benchmarks/tokenizing.py, which says what is measured.

    python benchmarks/tokenize.py [--help]

A file apart, because it has the name of a module of the standard library, and the folder of a script stands first
where modules are looked for. Whoever imports `tokenize` here, as most libraries do, gets the library's.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != HERE]

if __name__ == "__main__":
    import runpy

    runpy.run_path(os.path.join(HERE, "tokenizing.py"), run_name="__main__")
else:
    del sys.modules[__name__]
    import tokenize  # noqa: F401
