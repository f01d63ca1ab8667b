"""Text to shards to batches."""
