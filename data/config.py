"""Settings of the data layer."""

from dataclasses import dataclass, field
from typing import Literal

Interpolation = Literal["bilinear", "bicubic", "fast-bilinear", "fast-bicubic", "area", "linear"]


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes to a training image, made by timm's transforms in this order.

    Attributes:
        scale: range of the random crop's area, as a fraction of the image.
        ratio: range of the random crop's aspect ratio.
        hflip: probability of a horizontal flip.
        vflip: probability of a vertical flip.
        randaugment: timm's RandAugment string, such as "rand-m9-mstd0.5-inc1"; empty for none.
        color_jitter: strength of brightness, contrast and saturation jitter; 0 for none. RandAugment replaces it.
        erase_prob: probability of random erasing.
        erase_mode: what an erased rectangle is filled with: zeros, one random colour, or random pixels.
        mixup: alpha of mixup's Beta distribution; 0 for none.
        cutmix: alpha of cutmix's Beta distribution; 0 for none.
        mix_prob: probability that a group of samples is mixed at all.
        mix_switch_prob: probability of cutmix where both are on.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    randaugment: str = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.0
    erase_prob: float = 0.25
    erase_mode: Literal["const", "rand", "pixel"] = "pixel"
    mixup: float = 0.8
    cutmix: float = 1.0
    mix_prob: float = 1.0
    mix_switch_prob: float = 0.5


@dataclass(frozen=True)
class DataConfig:
    """What is read, in which order, and how it is shown to the model.

    Attributes:
        root: folder that `convneur prepare` wrote.
        engine: what decodes training images: "webdataset" (worker processes and timm's transforms, from either format)
            or "ffcv" (FFCV's loader: threads, random crops and flips).
        decode: where training images are decoded: "cpu", or "nvjpeg": on the GPU, those of tiled shards. Crops and
            flips are the same, pixels others; nothing else can be done to them there, so RandAugment must be off.
        format: format that the dataset is read from: "tar" (WebDataset shards), "ffcv" (.beton) or "auto": .beton for
            the engine "ffcv" and where there are no shards, else shards. Both give the same images.
        train_split: split that is trained on.
        val_split: split that is evaluated on.
        subset: how many samples of the training split are used, 0 for all: so many of every class, as far as they go.
            Of one subset_seed a smaller subset is part of every larger one.
        subset_seed: which of the subsets it is, whatever the run's seed.
        image_size: side in pixels of the square that the model sees.
        interpolation: resampling of resized images. "bilinear" and "bicubic" are Pillow's, to the bit, and "area" is
            OpenCV's, as FFCV uses it: in C++ where there is a compiler. The "fast-" ones are torch's of Pillow's
            filters, nearly the same pixels, for machines without one. "linear" is OpenCV's too, but aliased where an
            image is made much smaller.
        mean: per-channel mean of pixels scaled to 0..1, taken off them.
        std: per-channel standard deviation they are then divided by.
        global_batch_size: images an optimizer step, over all ranks and accumulated micro-batches.
        lanes: parallel streams the epoch's order is cut into; a step takes global_batch_size / lanes images from each.
            Every rank and micro-batch reads whole lanes, so world size times accumulation must divide it.
        window: spans of contiguous samples, at most a shard each, that are shuffled together within a lane.
        block: for shards sorted by class: blocks of so many contiguous samples are shuffled instead of whole shards,
            and a window has so many blocks that it is as large as before. 1 is a full shuffle, 0 leaves shards whole.
            All of the dataset is read at a time, so shards on servers must all fit into the cache.
        repeats: views of a sample that follow each other, each augmented by itself ("repeated augmentation",
            arXiv 1901.09335). An epoch has as many images as without, of so many times fewer samples.
        workers: decoding processes a rank; 0 decodes in the training process.
        bad_limit: how many different training samples may turn out to be unreadable, and be replaced, before the run
            stops: a fraction of the split where below 1, else a count.
        cache_dir: folder on the node's own disk for shards that lie on a server; empty for one among temporary files.
        cache_gb: how many gigabytes (10^9 bytes) of shards that folder may hold. All ranks of a node share it.
        eval_batch_size: images a rank evaluates at once.
        eval_crop: fraction of the resized image's side that evaluation's centre crop keeps.
        augment: random changes to training images.
    """

    root: str = "datasets/imagenet"
    engine: Literal["webdataset", "ffcv"] = "webdataset"
    decode: Literal["cpu", "nvjpeg"] = "cpu"
    format: Literal["auto", "tar", "ffcv"] = "auto"
    train_split: str = "train"
    val_split: str = "val"
    subset: int = 0
    subset_seed: int = 0
    image_size: int = 224
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    global_batch_size: int = 1024
    lanes: int = 64
    window: int = 8
    block: int = 0
    repeats: int = 1
    workers: int = 8
    bad_limit: float = 0.001
    cache_dir: str = ""
    cache_gb: float = 100.0
    eval_batch_size: int = 128
    eval_crop: float = 0.875
    augment: AugmentConfig = field(default_factory=AugmentConfig)
