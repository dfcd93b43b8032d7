"""An algorithm's name is all that a configuration needs."""
