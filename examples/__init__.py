"""Runnable examples of ``lightning_rejuv``; start with ``python -m examples.sft_to_rl.demo``."""
