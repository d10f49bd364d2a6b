"""`python -m convneur.launch` is `convneur`; this is how ranks are started."""

import sys

from convneur.launch.cli import main

sys.exit(main())
