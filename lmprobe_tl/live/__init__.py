"""Live scoring from the inside: what `Monitor` is built of, and the jobs that run on it."""
