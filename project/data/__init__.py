"""From a log to batches: readers, protocol, prompt, streams, batches, requests."""
