"""LightningCLI: the stages of `examples/sft_to_rl` as an application that YAML files and options configure."""
