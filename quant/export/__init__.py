"""Networks as files to ship: a format a file."""
