"""``python -m sculpt.cli``"""

import sys

from sculpt.cli import main

sys.exit(main())
