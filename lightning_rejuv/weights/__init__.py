"""How parameters are read and edited wherever they live: plain, under LoRA adapters, in an optimizer's memory."""
