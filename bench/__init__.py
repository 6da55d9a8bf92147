"""One question about driftgate's speed per module, each answered with one printed line."""
