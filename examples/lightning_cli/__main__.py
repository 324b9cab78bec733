"""``python -m examples.lightning_cli fit --config examples/lightning_cli/sft.yaml``."""

from examples.lightning_cli.app import main

main()
