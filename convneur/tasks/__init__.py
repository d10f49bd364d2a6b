"""What a run trains for: losses, targets and scores."""
