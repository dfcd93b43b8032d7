"""Run-directory records, the progress line, wandb (the only code that imports it)."""
