"""What to build: the variants of ConvNeur, and the settings of a model. Loads no PyTorch.

Source: "Efficiency Follows Global-Local Decoupling", CVPR 2026 (arXiv 2603.19567). The paper gives the equations and
the totals of M1-M4, not widths and depths: `VARIANTS` is a reconstruction. It takes stem, downsampling and blocks
from ConvNeXt (arXiv 2201.03545), halves the channels for the memory, and is the one assignment found that explains
all four published parameter counts (4.3, 6.1, 10.6 and 18.1 M). N1-N3 and M5-M9 continue it below and above.

Shape legend: C channels of a stage, d bottleneck width of the global branch.
"""

import re
from dataclasses import MISSING, dataclass, field, fields, replace
from math import inf
from operator import attrgetter
from typing import Literal, get_args

from convneur.ops.memory.reading import ReadOrder

MixerKind = Literal["neural_memory", "cbam", "non_local", "self_attention", "ir_rwkv", "titans"]
Placement = Literal["none", "per_stage", "per_layer"]
Fusion = Literal["gate", "add", "concat"]
GlobalPool = Literal["avg", "max", "avgmax", ""]


@dataclass(frozen=True)
class Variant:
    """Blocks a stage and the width of the first stage; the width doubles every stage."""

    depths: tuple[int, int, int, int]
    base_width: int

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels C of the four stages."""
        return tuple(self.base_width << stage for stage in range(4))


VARIANTS = {
    "n1": Variant((2, 2, 6, 2), 16),
    "n2": Variant((2, 2, 6, 2), 24),
    "n3": Variant((2, 2, 6, 2), 32),
    "m1": Variant((2, 2, 6, 2), 40),
    "m2": Variant((2, 2, 6, 2), 48),
    "m3": Variant((2, 2, 6, 2), 64),
    "m4": Variant((2, 2, 8, 2), 80),
    "m5": Variant((3, 3, 9, 3), 96),
    "m6": Variant((3, 3, 27, 3), 96),
    "m7": Variant((3, 3, 27, 3), 128),
    "m8": Variant((3, 3, 27, 3), 192),
    "m9": Variant((3, 3, 27, 3), 256),
}

OWN = "convneur"
"""The family of the variants above, and of free shapes."""
ANY_FAMILY = ("variant", "num_classes", "in_chans", "drop_rate", "drop_path")
"""Settings that mean something to the models of every family."""

LARGEST = 10**9
WIDEST, DEEPEST = 9998, 999  # of a free shape: what is larger is a slip, and would take hours to be looked at
FREE_SHAPE = re.compile(r"([1-9]\d*)x([1-9]\d*)-([1-9]\d*)-([1-9]\d*)-([1-9]\d*)")


def variant_named(name: str, key: str = "model.variant") -> Variant:
    """A row of VARIANTS, or what a free name such as "24x2-2-6-2" says: first width, then the blocks of each stage.

    Raises ValueError, which calls the setting `key`, where it is neither; widths are even, because the memory's
    bottleneck is half of one.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    match = FREE_SHAPE.fullmatch(name)
    if match is None or int(match[1][-1]) % 2:
        raise ValueError(
            f"{key} is {name!r}, expected one of {', '.join(map(repr, VARIANTS))}, or an even first width and"
            " the blocks of the four stages, such as '24x2-2-6-2'"
        )
    base_width, *depths = (int(number[:9]) for number in match.groups())
    if base_width > WIDEST or max(depths) > DEEPEST:
        raise ValueError(f"{key} is {name!r}, expected a width of at most {WIDEST} and depths of at most {DEEPEST}")
    return Variant((depths[0], depths[1], depths[2], depths[3]), base_width)


# Width d of each mixer as a fraction of C. GMACs of M3 with each of them, built (and in the paper): 1.67 (1.8),
# 1.42 (1.5), 3.01 (3.0), 1.77 (1.8), 1.97 (2.0), 2.62 (3.1).
WIDTH_RATIOS: dict[MixerKind, float] = {
    "neural_memory": 1 / 2,
    "cbam": 1 / 2,
    "non_local": 1,
    "self_attention": 1 / 4,
    "ir_rwkv": 1 / 2,
    "titans": 1 / 2,
}

MUP_INNER_LR = -1  # exponent of the width factor that muP multiplies memory.inner_lr with; mup.py derives it
SMALLEST_IMAGE = 32  # pixels a side: the stages reduce it by 4, 8, 16 and 32


@dataclass(frozen=True)
class MemoryConfig:
    """Settings of the neural memory.

    Attributes:
        chunk_length: tokens a chunk, L (paper: 196 for classification, 4096 for detection).
        inner_lr: scale of the inner step size theta (paper: 1 for classification, 1e-3 for detection).
        read: what chunk t reads. "before_update" (paper): the state left by chunk t-1. "after_update": the state that
            chunk t itself just wrote. "final_state": the state after the last chunk, so that every position sees the
            whole image.
    """

    chunk_length: int = 196
    inner_lr: float = 1.0
    read: ReadOrder = "before_update"


@dataclass(frozen=True)
class ModelConfig:
    """What to build.

    Attributes:
        variant: a row of VARIANTS, n1..n3 or m1..m9, or a shape of its own: "24x2-2-6-2" has 24 channels in the first
            stage and 2, 2, 6 and 2 blocks in the four. FAMILY:NAME is a model of another family.
        num_classes: outputs of the head; 0 for no classifier.
        in_chans: channels of the input image.
        placement: where global branches sit: in no block (the local-only control), in the first block of every stage
            (paper's default), or in every block.
        branch: what the global branch computes; `convneur.models.convneur.mixers` has them all.
        fusion: how the global context G meets the local features: "gate" (paper's default) multiplies them by
            sigmoid(G), "add" adds G, "concat" concatenates G and projects back to C.
        memory: settings of the neural memory.
        chunk_lengths: chunk length of each stage, where the stages differ; null for memory.chunk_length in all.
        inner_lrs: scale of the inner step size in each stage, where the stages differ; null for memory.inner_lr in all.
        branch_widths: bottleneck width d of each stage; null for the branch's own fraction of C.
        global_pool: pooling before the head; "" for none (a map of logits).
        drop_rate: dropout before the classifier.
        drop_path: stochastic-depth rate of the last block; rises linearly from 0 at the first.
        layer_scale: initial value of the per-channel scale of a block's residual.
        mup_base: variant or shape at whose width optimizer.lr was chosen; muP (mup.py) then carries it over to
            the width of this one. Empty for the standard parametrization.
    """

    variant: str = "m4"
    num_classes: int = 1000
    in_chans: int = 3
    placement: Placement = "per_stage"
    branch: MixerKind = "neural_memory"
    fusion: Fusion = "gate"
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    chunk_lengths: tuple[int, int, int, int] | None = None
    inner_lrs: tuple[float, float, float, float] | None = None
    branch_widths: tuple[int, int, int, int] | None = None
    global_pool: GlobalPool = "avg"
    drop_rate: float = 0.0
    drop_path: float = 0.0
    layer_scale: float = 1e-6
    mup_base: str = ""

    @property
    def family(self) -> str:
        """Who builds the model; see `convneur.models.build.FAMILIES`."""
        return self.variant.partition(":")[0] if ":" in self.variant else OWN

    def __post_init__(self) -> None:
        if self.family == OWN:
            variant_named(self.variant)
        else:
            self._check_foreign()
        choices = {
            "placement": get_args(Placement),
            "branch": get_args(MixerKind),
            "fusion": get_args(Fusion),
            "global_pool": get_args(GlobalPool),
            "memory.read": get_args(ReadOrder),
        }
        for key, allowed in choices.items():
            if (value := attrgetter(key)(self)) not in allowed:
                raise ValueError(f"model.{key} is {value!r}, expected one of {', '.join(map(repr, allowed))}")
        for key, least in {"num_classes": 0, "in_chans": 1, "memory.chunk_length": 1, "memory.inner_lr": 0}.items():
            if not least <= (value := attrgetter(key)(self)) < inf:
                raise ValueError(f"model.{key} is {value}, expected at least {least}")
            if value > LARGEST:
                raise ValueError(f"model.{key} is {value}, expected at most {LARGEST:,}")
        for key in ("drop_rate", "drop_path"):
            if not 0 <= (value := getattr(self, key)) < 1:
                raise ValueError(f"model.{key} is {value}, expected a rate in [0, 1)")
        for key in ("chunk_lengths", "inner_lrs", "branch_widths"):
            values = getattr(self, key)
            if values is not None and (len(values) != 4 or min(values) <= 0):
                raise ValueError(f"model.{key} is {list(values)}, expected four numbers above 0, one a stage")
        if self.mup_base:
            self._check_mup()

    def _check_foreign(self) -> None:
        own = [setting for setting in fields(self) if setting.name not in ANY_FAMILY]
        defaults = {f"model.{setting.name}": setting.default for setting in own if setting.default is not MISSING}
        defaults |= {f"model.memory.{setting.name}": setting.default for setting in fields(MemoryConfig)}
        values = {key: attrgetter(key.removeprefix("model."))(self) for key in defaults}
        odd = [key for key, default in defaults.items() if values[key] != default]
        if odd:
            words = {None: "null", "": "''"}  # how a shell is given these defaults
            back = " ".join(f"--{key} {words.get(defaults[key], defaults[key])}" for key in odd)
            raise ValueError(
                f"{', '.join(f'{key} is {values[key]!r}' for key in odd)}, which says nothing to model.variant"
                f" {self.variant!r}: leave it out or, where a file sets it, set it back by {back} (only"
                f" {', '.join(ANY_FAMILY)} are for models of every family)"
            )

    def _check_mup(self) -> None:
        variant_named(self.mup_base, "model.mup_base")
        if self.placement != "none" and self.branch != "neural_memory":
            raise ValueError(
                f"model.mup_base is {self.mup_base!r} with model.branch {self.branch!r}, for which no scaling with the"
                " width was derived: use neural_memory, model.placement none, or leave model.mup_base out"
            )
        if self.branch_widths is not None:
            raise ValueError(
                f"model.mup_base is {self.mup_base!r} with model.branch_widths {list(self.branch_widths)}, expected"
                " null: the widths of the branches have to grow with the others"
            )

    @property
    def width_factor(self) -> float:
        """Width as a multiple of that of mup_base; 1 without."""
        return variant_named(self.variant).base_width / variant_named(self.mup_base or self.variant).base_width

    @property
    def depth_warning(self) -> str | None:
        """What has to be said where the depths aren't those of mup_base, over which muP carries no learning rate."""
        if self.family != OWN:
            return None
        depths, base = (variant_named(name or self.variant).depths for name in (self.variant, self.mup_base))
        if depths == base:
            return None
        return (
            f"{'-'.join(map(str, depths))} blocks, model.mup_base {self.mup_base} {'-'.join(map(str, base))}: muP"
            " carries a learning rate over widths, not over depths; try some around it"
        )

    def branch_width(self, stage: int) -> int:
        """Bottleneck width d of a stage's global branch."""
        if self.branch_widths is not None:
            return self.branch_widths[stage]
        return round(variant_named(self.variant).widths[stage] * WIDTH_RATIOS[self.branch])

    def stage_memory(self, stage: int) -> MemoryConfig:
        """Settings of a stage's neural memory."""
        inner_lr = self.inner_lrs[stage] if self.inner_lrs else self.memory.inner_lr
        return replace(
            self.memory,
            chunk_length=self.chunk_lengths[stage] if self.chunk_lengths else self.memory.chunk_length,
            inner_lr=inner_lr * self.width_factor**MUP_INNER_LR,
        )
