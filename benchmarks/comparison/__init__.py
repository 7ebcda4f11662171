"""What ``compare.py`` measures: three public implementations of the method, on tiny random models.

``peers`` attaches, detaches, saves and loads each of them alike; ``facts``, ``training``, ``files`` and ``modes`` hold the
rows; ``forked`` runs one in a process of its own; ``page`` shows the record.
"""

import sys
from pathlib import Path

for folder in ("tests", "tests/architectures"):  # the tiny models are those of the tests
    sys.path.append(str(Path(__file__).resolve().parents[2] / folder))
