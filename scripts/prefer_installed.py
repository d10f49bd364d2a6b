"""Lets `import convneur` find the installed checkout from the folder that holds it, too.

There Python takes the checkout's folder, if it is called convneur, for a namespace package, and never asks the finder
of an editable installation. scripts/setup.sh puts this file into the environment, whose Python runs it when it starts.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder


class PreferInstalled:
    """Asks the other finders for convneur where its folder alone would be found."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> "ModuleSpec | None":
        """None where Python's own search does well."""
        if name != "convneur" or (found := PathFinder.find_spec(name)) is None or found.has_location:
            return None
        others = (finder for finder in sys.meta_path if finder not in (cls, PathFinder))
        return next((spec for finder in others if (spec := finder.find_spec(name, None, None))), None)


sys.meta_path.insert(0, PreferInstalled)
