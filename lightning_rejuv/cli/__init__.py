"""The command ``lightning-rejuv``."""
