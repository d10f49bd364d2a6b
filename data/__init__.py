"""The data room: from image files to the batches of an optimizer step.

Datasets are WebDataset shards with an index beside them (`shards`, `digits`), read through one small interface
(`store`). The order of an epoch is a pure function of (seed, epoch) (`order`) and every random draw one of a key
(`keys`), so that the stream of samples is the same for any number of ranks, accumulated micro-batches and workers, and
a run resumes anywhere at no cost (`loader`). Images are decoded and augmented by worker processes (`transforms`);
normalisation, erasing and mixing happen on the device (`mixing`). `check` finds what can't work before anything is
allocated. This room imports nothing from the others.
"""
