"""The study on a real pretrained model: see ``studies/real/plan.md``."""
