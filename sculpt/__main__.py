"""``python -m sculpt``, and what ``accelerate launch -m sculpt molecules ...`` runs."""

import sys

from sculpt.apps.cli import main

if __name__ == "__main__":
    sys.exit(main())
