"""Where documents come from, one file each: a module defines `Config` and `documents(config)`."""
