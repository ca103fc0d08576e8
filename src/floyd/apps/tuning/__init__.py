"""Fine-tuning a stage of IF: what `floyd train` runs. `config.TuneConfig` says what, `run.tune` does it."""
