"""What ranks import, at their start or later on; the server of `forked` does it once for all of them."""

from importlib import import_module

from convneur.launch.imports import importing

with importing():
    from convneur.system.world import name_accelerator

    name_accelerator()
    for name in ("convneur.train", "convneur.records.curves", "torch.utils.tensorboard"):
        import_module(name)
    from deepspeed.utils import nvtx

    nvtx.enable_nvtx = False  # names for a GPU's profiler, which take a fourteenth of ZeRO 3's time here
