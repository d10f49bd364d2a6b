"""Whether NVIDIA's apex is here."""

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from convneur.system.finding import Finding

_COST = "no fused optimizers of apex; PyTorch's AdamW doesn't need it"
_BUILD = "build NVIDIA's from github.com/NVIDIA/apex: APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation ."


def examine_apex() -> Finding:
    """Tells NVIDIA's apex from the registry's unrelated package of that name, without importing either."""
    spec = find_spec("apex")
    if spec is None:
        return Finding("packages", "apex", "missing", None, f"{_COST}; {_BUILD}")
    try:
        version = metadata.version("apex")
    except metadata.PackageNotFoundError:
        version = "of unknown version"
    if not any((Path(folder) / "optimizers").is_dir() for folder in spec.submodule_search_locations or ()):
        note = f"another package has this name; {_COST}; pip uninstall apex, then {_BUILD}"
        return Finding("packages", "apex", "wrong", version, note)
    if find_spec("amp_C") is None:
        return Finding("packages", "apex", "broken", version, f"built without CUDA extensions: {_COST}; {_BUILD}")
    return Finding("packages", "apex", "ok", version)
