"""fine_tune: fine-tune and train causal language models from one YAML."""

__version__ = "0.1.0"
