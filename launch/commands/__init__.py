"""The commands of `convneur`, one file each."""
