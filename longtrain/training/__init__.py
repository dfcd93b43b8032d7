"""Step and loop. No Ray: everything comes from the configuration and the env:// variables, so torchrun runs it too."""
