"""What the study says: statistics, tables and figures from its raw results; see docs/evidence.md."""
