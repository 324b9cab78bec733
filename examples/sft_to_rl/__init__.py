"""Base → excessive SFT → rejuvenation → GRPO, on a small Llama, in one command."""
