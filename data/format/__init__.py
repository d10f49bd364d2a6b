"""What a dataset is on disk: manifest, index and shards."""
