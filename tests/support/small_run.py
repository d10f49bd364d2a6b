"""A run small enough for a test that still has everything in it: memory updates, drop path, mixing, averaging."""

import hashlib
import json
from pathlib import Path

from convneur.config import Config, RunConfig, TrainConfig
from convneur.data.config import AugmentConfig, DataConfig
from convneur.engine.config import OptimizerConfig, ScheduleConfig
from convneur.models.convneur.config import MemoryConfig, ModelConfig
from convneur.records.folder import MANIFEST, OPTIMIZER_FILE, STATE_FILE

VARIANT = "16x2-1-1-1"  # a second block, without a global branch, in the first stage alone
STEPS, BATCH = 11, 32
IMAGES = STEPS * BATCH + 13  # digits to train on: the last ones don't fill a batch, and are left out


def small_config(
    digits: Path, zero_stage: int, *, autocast: bool = True, accumulation: int = 1, **run: object
) -> Config:
    """One epoch of 11 steps with a checkpoint after the 4th and the 8th."""
    return Config(
        run=RunConfig(
            **{"name": "small", "determinism": "strict", "log_every_steps": 1, "checkpoint_every_steps": 4, **run}
        ),
        model=ModelConfig(
            VARIANT, num_classes=10, memory=MemoryConfig(chunk_length=16), drop_path=0.3, layer_scale=0.1
        ),
        data=DataConfig(
            root=str(digits),
            image_size=32,
            subset=IMAGES,
            global_batch_size=BATCH,
            lanes=8,
            workers=1,
            eval_crop=1.0,
            augment=AugmentConfig(hflip=0.0, randaugment="rand-m5-n1", mixup=0.4, cutmix=0.5),
        ),
        train=TrainConfig(accumulation=accumulation, ema_decay=0.9),
        optimizer=OptimizerConfig(lr=2e-3),
        schedule=ScheduleConfig(epochs=1, warmup_epochs=0.2),
        deepspeed={
            "zero_optimization": {"stage": zero_stage},
            "torch_autocast": {"enabled": autocast, "dtype": "bfloat16"},
        },
    )


def complete(checkpoint: Path) -> None:
    """Gives a folder that holds a model what else makes it a checkpoint: some files of no matter, and the manifest."""
    for name in (STATE_FILE, OPTIMIZER_FILE):
        (checkpoint / name).write_text("{}")
    manifest = {}
    for path in checkpoint.iterdir():
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        manifest[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
