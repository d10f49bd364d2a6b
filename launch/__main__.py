"""`python -m convneur.launch` is `convneur`; this is how ranks are started."""

import sys

from convneur.launch import leash

leash.tie()

from convneur.launch.cli import main  # noqa: E402 - what it loads takes time, in which the launcher may end

sys.exit(main())
