"""Training in several processes: what each kind of parallelism splits, what it sends, and what it saves."""
