"""What a run shows of itself: metrics on disk, plots."""
