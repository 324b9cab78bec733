"""Studies on top of the examples: many seeds, many arms, raw results under ``docs/results``."""
